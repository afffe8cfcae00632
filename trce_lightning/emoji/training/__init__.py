"""How the embedded model was made: art, captions, training. Nothing of a run imports it."""
