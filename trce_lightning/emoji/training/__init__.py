"""Train the embedded model: art, captions and networks. A run imports nothing from here."""
