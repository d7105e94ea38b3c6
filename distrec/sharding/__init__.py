"""Embedding tables spread over ranks: where rows lie, how ranks talk, how rows are looked up."""
