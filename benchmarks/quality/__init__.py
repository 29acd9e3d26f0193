"""How well sounds are learned, and what becomes of what has grown."""
