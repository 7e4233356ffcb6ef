"""Generated tasks that a model is trained on. Each class draws an example, and states its chance level; the optimum is 1."""
