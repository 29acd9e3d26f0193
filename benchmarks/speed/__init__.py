"""How long a rollout takes, on a CPU and on a GPU."""
