"""The default templates of a concept and the counterpart of free words, by kind.

The module imports no torch.
"""

KINDS = ("subject", "style")
LANGUAGE_NAMES = {"fr": "French", "es": "Spanish", "de": "German", "zh": "Chinese", "ja": "Japanese"}
"""The languages of a concept's translations by their codes (ISO 639-1)."""
DEFAULT_COUNTERPART = {"subject": "a flower", "style": "plain"}
DEFAULT_TEMPLATES: dict[str, tuple[str, ...]] = {
    "subject": (
        "{}",
        "a picture of {}",
        "{} on a white background",
        "a 3d render of {} on red",
        "{} as a flat sticker",
        "a cartoon of {} on a blue background",
        "an icon of {}",
        "look at this: {}",
        "{} in front of green",
        "flat style, {}, black background",
        "{} in 3d style on a pink background",
        "please draw {} in cartoon style",
        "a drawing of {}, cartoon, orange background",
        "{} with a purple background",
        "{}, seen from the front, on yellow",
    ),
    "style": (
        "{} style",
        "a house in {} style",
        "a portrait of a woman, {}",
        "{} style picture of a cat",
        "a harbour with boats, {} style",
        "{}: a vase on a table",
        "an umbrella ({})",
        "{}, a landscape",
        "a tree, drawn in {} style",
        "style: {}, subject: a chair",
        "a red car, {}, white background",
        "{} picture: a camera",
        "a village in {} style, seen from above",
        "{} style, one balloon",
        "this star has the {} look",
    ),
}
"""The default templates by kind.

Those for subjects fit noun phrases with their article. Those for styles fit words that can stand before
"style".
"""
