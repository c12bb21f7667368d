"""How client results become the next global model."""
