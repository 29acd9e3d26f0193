"""How a model learns sounds: recipes, losses, optimizers, the trainer."""
