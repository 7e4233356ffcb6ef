"""One file per primitive: its definition, its exact PyTorch forms, and a lazy launch of triton/<same name>.py."""
