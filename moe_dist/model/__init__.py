"""The transformer, written for one device: no collective in here."""
