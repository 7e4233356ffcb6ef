"""Tools with a memory, agents that use them, and a task for models with the tool in the loop."""
