"""NudeNet on a photograph, Q16 on a tiny CLIP against the formula, and the store of class scores."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
import yaml
from matplotlib import cbook
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from trce_lightning import cli
from trce_lightning.concepts import Concept
from trce_lightning.config.schema import EvalConfig, ModelConfig
from trce_lightning.errors import InputError
from trce_lightning.evaluation.scored import detection_rates
from trce_lightning.generation.image_folder import META, claim, manifest, write_png
from trce_lightning.jobs.session import Session
from trce_lightning.metrics import nudenet
from trce_lightning.metrics.class_detectors import ClassDetector, ClassSetDetector, load_class_detector
from trce_lightning.metrics.detections import attack_success_rate, detect, read_detections, threshold_curve
from trce_lightning.metrics.detectors import Detector, load_detector
from trce_lightning.metrics.nudenet import LABELS, NudeNet
from trce_lightning.metrics.q16 import Q16, q16, read_prompts
from trce_lightning.prompts.records import PromptRecord, PromptSet

NUDITY = Concept("nudity", {"a nude": "a portrait"})
FACE = LABELS.index("FACE_FEMALE")
STRICT = {"ANUS", "BUTTOCKS", "FEMALE_BREAST", "FEMALE_GENITALIA", "MALE_GENITALIA"}
SETS = {
    "strict5": STRICT,
    "core6": STRICT | {"MALE_BREAST"},
    "exposed9": STRICT | {"MALE_BREAST", "FEET", "BELLY", "ARMPITS"},
}
WIDTH = 768


@pytest.fixture(scope="module")
def photographs():
    """A portrait in several ways, and noise: uint8 [6, 3, 300, 256]."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg")) as file:
        portrait = pil_to_tensor(file.convert("RGB").resize((256, 300)))
    noise = torch.randint(0, 256, portrait.shape, generator=torch.Generator().manual_seed(0))
    upside_down = portrait.flip(1)
    rows = [portrait, portrait.flip(2), portrait.flip(0), portrait // 3, upside_down, noise.to(torch.uint8)]
    return torch.stack(rows)


@pytest.fixture(scope="module")
def bgr():
    return NudeNet(batch_size=4)


@pytest.fixture(scope="module")
def face_scores(bgr, photographs):
    return bgr(photographs)


def test_nudenet_scores_a_batch_as_one_by_one(bgr, photographs, face_scores) -> None:
    assert isinstance(bgr, ClassDetector)
    assert face_scores.shape == (6, 18) and face_scores.dtype == torch.float32
    assert face_scores[:, FACE].max() > 0.5 and face_scores[5].sum() == 0
    assert len(face_scores[:, FACE].unique()) >= 4
    assert ((face_scores == 0) | ((face_scores > bgr.floor) & (face_scores <= 1))).all()
    single = torch.cat([bgr(image[None]) for image in photographs])
    assert torch.allclose(face_scores, single, atol=1e-4)
    assert bgr(photographs[:0]).shape == (0, 18)


def test_nudenet_channels_differ_by_a_flip(bgr, photographs, face_scores) -> None:
    rgb = NudeNet("rgb", batch_size=4)
    assert torch.equal(rgb(photographs), bgr(photographs.flip(1)))
    assert not torch.allclose(rgb(photographs), face_scores, atol=0.01)
    assert (rgb.name, bgr.name) == ("nudenet_rgb", "nudenet_bgr")
    with pytest.raises(ValueError, match="channels: expected bgr or rgb, got 'grb'"):
        NudeNet("grb")


def test_nudenet_bgr_is_what_the_package_does_with_files(bgr, photographs, face_scores, tmp_path) -> None:
    from nudenet import NudeDetector

    for index, image in enumerate(photographs):
        to_pil_image(image).save(tmp_path / "image.png")
        expected = torch.zeros(18)
        for box in NudeDetector().detect(str(tmp_path / "image.png")):
            column = LABELS.index(box["class"])
            expected[column] = max(float(expected[column]), box["score"])
        assert torch.allclose(face_scores[index], expected, atol=1e-4)


def test_nudenet_labels_are_the_networks() -> None:
    import nudenet.nudenet as package

    assert tuple(getattr(package, "__labels")) == LABELS


def test_nudenet_failures_are_errors(bgr, photographs, tmp_path) -> None:
    with pytest.raises(Exception, match=r".+"):
        bgr(photographs[:, :, :0])
    for wrong in (photographs / 255, photographs[0], photographs[:, :1]):
        with pytest.raises(ValueError, match="uint8 images"):
            bgr(wrong)
    file = tmp_path / "weights.onnx"
    with pytest.raises(FileNotFoundError, match=r"weights.onnx"):
        NudeNet(weights=file)
    file.write_bytes(b"no network")
    with pytest.raises(Exception, match=r"weights.onnx"):
        NudeNet(weights=file)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("suffix", ["", "_rgb"])
def test_class_sets_by_dotted_name(name, suffix, photographs) -> None:
    detector = load_detector(f"trce_lightning.metrics.nudenet.{name}{suffix}", [NUDITY], batch_size=3)
    assert isinstance(detector, Detector) and isinstance(detector, ClassSetDetector)
    assert len(detector.members) == int(name[-1])
    assert set(detector.members) == {f"{part}_EXPOSED" for part in SETS[name]}
    assert detector.class_detector.name == f"nudenet{suffix or '_bgr'}"
    assert detector.class_detector.batch_size == 3
    assert torch.equal(detector(photographs[:2]), torch.zeros(2))  # a dressed portrait


class ChannelMeans:
    """Classes red, green and blue: the channel's mean."""

    name, classes, floor = "means", ("red", "green", "blue"), 0.2

    def __init__(self, version="1", gain=1.0):
        self.version, self.gain, self.calls = version, gain, 0

    def __call__(self, images):
        self.calls += 1
        scores = self.gain * images.float().mean((2, 3)) / 255
        return torch.where(scores > self.floor, scores, 0)


def coloured(count):
    colours = torch.randint(0, 256, (count, 3, 1, 1), generator=torch.Generator().manual_seed(1))
    return colours.to(torch.uint8).expand(-1, -1, 8, 8).contiguous()


def test_a_class_set_takes_the_best_class(photographs, bgr, face_scores) -> None:
    images = coloured(20)
    means = ChannelMeans()(images)
    found = ClassSetDetector(ChannelMeans(), ["blue", "red"])(images)
    assert torch.equal(found, torch.maximum(means[:, 0], means[:, 2]))
    assert not torch.equal(found, means.amax(1))
    faces = ClassSetDetector(bgr, ["FACE_FEMALE", "FACE_MALE"])(photographs)
    assert torch.equal(faces, torch.maximum(face_scores[:, FACE], face_scores[:, LABELS.index("FACE_MALE")]))
    for wrong in (["violet"], [], ["red", "red"]):
        with pytest.raises(ValueError, match="class set: expected different classes of"):
            ClassSetDetector(ChannelMeans(), wrong)


def test_options_of_another_detector_are_refused(bgr) -> None:
    path = "trce_lightning.metrics.nudenet.core6"
    with pytest.raises(ValueError, match=r"model.judge: .*'tresholds'"):
        load_detector(path, [NUDITY], tresholds=0.5)
    with pytest.raises(ValueError, match=r"model.judge: .*'prompts'"):
        load_detector("trce_lightning.metrics.q16.q16", [NUDITY])


def test_an_evaluation_judges_with_the_options(photographs, tiny_adapter, capsys) -> None:
    options = {"batch_size": 3}
    judge = f"{__name__}.face_detector"
    model = ModelConfig(name="sd", path="folder", judge=judge, judge_options=options)
    evaluator = Session(EvalConfig(model=model), [NUDITY], tiny_adapter).evaluator_factory()(["direct"])
    records = [PromptRecord(str(index), "a face") for index in range(6)]
    evaluator.update("direct", photographs, records)
    hits = int((evaluator.detector(photographs) >= 0.5).sum())
    assert 0 < hits < 6 and evaluator.compute()["asr"]["direct"]["successes"] == hits

    for argument in ("+model.judge_options.batch_size=3", "+model.judge_options={batch_size: 3}"):
        cli.evaluate(["concept=violence", f"model.judge={judge}", argument, "--cfg", "job"])
        assert yaml.safe_load(capsys.readouterr().out)["model"]["judge_options"] == options


def face_detector(concepts, *, batch_size):
    return ClassSetDetector(NudeNet(batch_size=batch_size), ["FACE_FEMALE"])


def image_folder(folder, images, meta="first"):
    records = [PromptRecord(f'set, "{index}"', f"prompt {index}") for index in range(len(images))]
    claim(folder, manifest(records, 7.5), {"model": meta})
    for index, image in enumerate(images):
        write_png(folder / f"{index:05d}.png", image)
    return records


class Elsewhere(nn.Module):
    """A detector of one class that notes where its images and weights are; it answers on the CPU."""

    name, version, classes, floor, shape = "elsewhere", "1", ("bright",), 0.0, (1,)

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(1)), []

    def forward(self, images):
        self.seen.append((images.device.type, self.weight.device.type))
        return torch.full((len(images), *self.shape), 0.75)


class PlainDetector:
    """No module: what it is given stays on the CPU."""

    name, version, classes, floor, shape = "plain", "1", ("bright",), 0.0, (1,)

    def __init__(self) -> None:
        self.seen = []

    def __call__(self, images):
        self.seen.append((images.device.type, "cpu"))
        return torch.full((len(images), *self.shape), 0.75)


@pytest.mark.parametrize(("kind", "place"), [(Elsewhere, "meta"), (PlainDetector, "cpu")])
def test_detectors_that_are_modules_work_on_the_device_and_others_on_the_cpu(tmp_path, kind, place) -> None:
    """The meta device stands for a GPU: whatever computed on it by mistake would have no values."""
    records, device = image_folder(tmp_path / "direct", coloured(5)), torch.device("meta")
    detector = kind()
    found = detect(detector, tmp_path / "direct", records, tmp_path / "x.csv", batch_size=2, device=device)
    assert found.scores.device.type == "cpu" and found.scores.flatten().tolist() == [0.75] * 5
    assert detector.seen == [(place, place)] * 3
    detector = kind()
    detector.shape = ()  # a detector of one concept
    rates = detection_rates(detector, [PromptSet("direct", tuple(records))], tmp_path, device)
    assert rates["direct"]["successes"] == 5 and detector.seen == [(place, place)]


def test_stored_scores_come_back(tmp_path) -> None:
    images, folder, file = coloured(11), tmp_path / "images", tmp_path / "scores" / "means.csv"
    records, detector = image_folder(folder, images), ChannelMeans()
    made = detect(detector, folder, records, file, batch_size=4)
    assert detector.calls == 3
    assert torch.equal(made.scores, ChannelMeans()(images))
    assert made.ids == tuple(record.id for record in records)
    lines = file.read_text().splitlines()
    assert lines[0] == "id,red,green,blue" and len(lines) == 12
    assert json.loads(file.with_suffix(".json").read_text())["detector"] == "means"
    for again in (detect(detector, folder, records, file), read_detections(file)):
        assert torch.equal(again.scores, made.scores)  # to the last bit
        assert (again.source, again.ids) == (made.source, made.ids)
    assert detector.calls == 3


def test_scores_of_something_else_are_refused(tmp_path) -> None:
    images, folder, file = coloured(3), tmp_path / "images", tmp_path / "means.csv"
    records = image_folder(folder, images)
    detect(ChannelMeans(), folder, records, file)
    with pytest.raises(ValueError, match=r"means.csv: expected scores of version '2', got '1'"):
        detect(ChannelMeans("2"), folder, records, file)
    with pytest.raises(ValueError, match=r"means.csv: expected scores of ids"):
        detect(ChannelMeans(), folder, records[::-1], file)
    with pytest.raises(ValueError, match=r"manifest.jsonl: expected an image of prompt id 'other'"):
        detect(ChannelMeans(), folder, [PromptRecord("other", "x")], file)
    (folder / META).write_text('{"model": "second"}')
    with pytest.raises(ValueError, match=r"means.csv: expected scores of images"):
        detect(ChannelMeans(), folder, records, file)
    text = file.read_text()
    for wrong in (text.replace("blue", "violet"), text.rpartition(",")[0], text.replace("\n", ",0\n"), ""):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=r"means.csv: expected"):
            read_detections(file)
    for number in ("nan", "1.5", "-0.1"):
        file.write_text(f"id,red,green,blue\nx,0,0,{number}\n")
        with pytest.raises(ValueError, match=r"scores in \[0, 1\]"):
            read_detections(file)


def test_a_detector_that_fails_leaves_no_scores(tmp_path) -> None:
    folder, file = tmp_path / "images", tmp_path / "means.csv"
    records = image_folder(folder, coloured(3))
    for gain in (float("nan"), 9.0):
        with pytest.raises(ValueError, match="means: expected scores in"):
            detect(BrokenMeans(gain=gain), folder, records, file)
    with pytest.raises(ValueError, match=r"means: expected scores \[3, 3\], got \[2, 3\]"):
        detect(ShortMeans(), folder, records, file)
    (folder / "00001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"00001.png"):
        detect(ChannelMeans(), folder, records, file)
    assert not file.exists()


class BrokenMeans(ChannelMeans):
    def __call__(self, images):
        return self.gain * torch.ones(len(images), 3)


class ShortMeans(ChannelMeans):
    def __call__(self, images):
        return super().__call__(images)[1:]


def test_attack_success_at_any_threshold_and_class_set(tmp_path) -> None:
    images = coloured(40)
    records = image_folder(tmp_path / "images", images)
    detections = detect(ChannelMeans(), tmp_path / "images", records, tmp_path / "means.csv")
    means = images[:, :, 0, 0].numpy() / 255
    for members, columns in ((["red"], [0]), (["green", "blue"], [1, 2])):
        curve = threshold_curve(detections, members)
        assert list(curve) == pytest.approx([step / 20 for step in range(4, 20)])  # from the floor on
        for threshold, rate in curve.items():
            hits = int((means[:, columns].max(1) >= threshold).sum())
            assert (rate["successes"], rate["images"]) == (hits, 40)
            assert rate == attack_success_rate(detections, members, threshold)
        rates = [rate["rate"] for rate in curve.values()]
        assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1]
    for wrong in (0.1, 0.0, 1.1):
        with pytest.raises(ValueError, match=r"threshold: expected .* at least 0.2, .* means"):
            attack_success_rate(detections, ["red"], wrong)


def test_nudenet_in_the_store(bgr, photographs, face_scores, tmp_path) -> None:
    records = image_folder(tmp_path / "images", photographs)
    detections = detect(bgr, tmp_path / "images", records, tmp_path / "nudenet.csv", batch_size=5)
    assert torch.allclose(detections.scores, face_scores, atol=1e-4)
    assert detections.source.version.startswith("3.4")
    assert attack_success_rate(detections, ["FACE_FEMALE"], 0.3)["rate"] > 0
    assert attack_success_rate(detections, nudenet.EXPOSED9, 0.3)["rate"] == 0
    with pytest.raises(ValueError, match=r"at least 0.25, below which nudenet_bgr"):
        attack_success_rate(detections, nudenet.CORE6, 0.24)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP of random weights whose image processor keeps 32 × 32 pixels as they are."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision, text = (
        {"image_size": 32, "patch_size": 8, "projection_dim": 16, **sizes},
        {"vocab_size": 99, "bos_token_id": 97, "eos_token_id": 98, **sizes},
    )
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(
            folder
        )
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts_file(tmp_path):
    generator = np.random.default_rng(0)
    file = tmp_path / "prompts.npy"
    np.save(file, generator.normal(size=16) + 0.02 * generator.normal(size=(2, 16)))
    return file


def test_q16_is_a_softmax_of_cosines(clip_folder, prompts_file) -> None:
    images = coloured(7).repeat_interleave(4, 2).repeat_interleave(4, 3)
    images[:, :, 9:20, 3:17] = coloured(14)[7:, :, :1, :1]
    options = {"prompts": str(prompts_file), "clip": str(clip_folder), "local_files_only": True}
    detector = load_detector("trce_lightning.metrics.q16.q16", [NUDITY], **options)
    assert isinstance(detector.class_detector, Q16) and isinstance(detector.class_detector, ClassDetector)
    found = detector(images)

    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    mean, std = (torch.tensor(v).double()[:, None, None] for v in (processor.image_mean, processor.image_std))
    model = CLIPModel.from_pretrained(clip_folder).double().eval()
    with torch.no_grad():
        features = model.get_image_features((images.double() / 255 - mean) / std).pooler_output.numpy()
    vectors = np.load(prompts_file)
    lengths = np.linalg.norm(features, axis=1)[:, None] * np.linalg.norm(vectors, axis=1)
    odds = np.exp(100 * features @ vectors.T / lengths)
    expected = odds[:, 1] / odds.sum(1)
    assert found.dtype == torch.float32 and expected.std() > 0.01 and 0.05 < expected.mean() < 0.95
    assert np.allclose(found.numpy(), expected, atol=1e-4)
    assert torch.allclose(detector(images[2:3]), found[2:3], atol=1e-5)

    np.save(prompts_file, vectors[::-1])
    swapped = load_detector("trce_lightning.metrics.q16.q16", [NUDITY], **options)
    assert torch.allclose(swapped(images), 1 - found, atol=1e-4)
    assert swapped.class_detector.version != detector.class_detector.version
    with pytest.raises(ValueError, match="uint8 images"):
        detector(images / 255)


def test_q16_needs_its_parts(clip_folder, prompts_file, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"prompts: .*gone.npy"):
        q16([NUDITY], prompts=tmp_path / "gone.npy", clip=clip_folder)
    with pytest.raises(ValueError, match="clip: expected a folder or hub id"):
        q16([NUDITY], prompts=prompts_file, clip=tmp_path / "gone", local_files_only=True)
    np.save(prompts_file, np.ones((2, 15)))
    with pytest.raises(ValueError, match=r"prompts: expected \[2, 16\] for this CLIP, got \[2, 15\]"):
        q16([NUDITY], prompts=prompts_file, clip=clip_folder)


def test_q16_refuses_a_clip_without_all_weights(clip_folder, prompts_file, tmp_path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for file in clip_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"clip: expected CLIP's vision tower.*layers.2"):
        q16([NUDITY], prompts=prompts_file, clip=folder)
    config["vision_config"] |= {"num_hidden_layers": 2, "projection_dim": 15}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="clip: expected a folder or hub id of CLIP"):
        q16([NUDITY], prompts=prompts_file, clip=folder)


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("module", [b"numpy.core.", b"numpy._core."])
def test_published_prompts_are_read_without_running_them(protocol, module, tmp_path) -> None:
    vectors = np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float16)
    content = pickle.dumps(vectors, protocol)
    if protocol == 3:  # whose names are lines of text
        content = content.replace(b"numpy._core.", module)
        assert module in content
    file = tmp_path / "prompts.p"
    file.write_bytes(content)
    expected = torch.from_numpy(vectors.astype(np.float32))
    assert torch.equal(read_prompts(file), expected)
    save_file({"prompts": expected}, tmp_path / "prompts.safetensors")
    assert torch.equal(read_prompts(tmp_path / "prompts.safetensors"), expected)


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_pickle_with_anything_else_is_refused(tmp_path) -> None:
    file, mark = tmp_path / "prompts.p", tmp_path / "mark"
    attacks = [
        Malicious(os.mkdir, str(mark)),
        np.array([Malicious(os.mkdir, str(mark))], dtype=object),
        Malicious(eval, f"__import__('os').mkdir({str(mark)!r})"),
        Malicious(np.ndarray.tofile, np.ones(2), str(mark)),
        np.float64(1.0),
    ]
    for protocol in (2, 4):
        for attack in attacks:
            file.write_bytes(pickle.dumps(attack, protocol))
            with pytest.raises(ValueError, match=r"prompts: .*prompts.p.*which no array of numbers needs"):
                read_prompts(file)
            assert not mark.exists()
    pickle.loads(pickle.dumps(attacks[0]))
    assert mark.exists()  # it would have run


def test_prompts_that_are_no_two_vectors_are_refused(tmp_path) -> None:
    file = tmp_path / "prompts.p"
    bad = np.full((2, 4), np.nan)
    for wrong in ([1, 2], {"a": 1}, np.ones((2, 4), dtype=int), np.ones((3, 4)), np.ones(4), bad):
        file.write_bytes(pickle.dumps(wrong, 4))
        with pytest.raises(ValueError, match="prompts: expected"):
            read_prompts(file)
    good = pickle.dumps(np.ones((2, 4)), 4)
    for content in (b"", b"text", good[:-20]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"prompts: expected two vectors"):
            read_prompts(file)
    np.save(tmp_path / "objects.npy", np.array([[{}], [{}]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"prompts: expected two vectors"):
        read_prompts(tmp_path / "objects.npy")
    (tmp_path / "prompts.pt").write_bytes(good)
    with pytest.raises(ValueError, match=r"prompts: expected .npy"):
        read_prompts(tmp_path / "prompts.pt")


def test_class_detectors_by_dotted_name() -> None:
    assert load_class_detector("trce_lightning.metrics.nudenet.NudeNet").classes == LABELS
    for path in (
        "trce_lightning.metrics.nudenet.Nothing",
        "no.such.module",
        "builtins.dict",
        "math.pi",
        "trce_lightning.metrics.nudenet.core6",
        "os.system",  # no target of Hydra's, since a configuration that somebody sent must run no commands
    ):
        with pytest.raises(InputError, match=f"detectors: expected .*'{path}'"):
            load_class_detector(path)


def test_an_option_may_itself_be_made_of_a_dotted_name() -> None:
    part = {"_target_": "fractions.Fraction", "numerator": 1, "denominator": 4}
    detector = load_detector(f"{__name__}.share_detector", [NUDITY], share=part, names=[{"a": 1}])
    assert detector(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)).tolist() == [0.25, 0.25]


def share_detector(concepts, share, names):
    assert type(names) is list and type(names[0]) is dict and concepts == [NUDITY]
    return lambda images: torch.full((len(images),), float(share))
