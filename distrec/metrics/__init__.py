"""How good recommendations are: ranking, classification and beyond accuracy."""
