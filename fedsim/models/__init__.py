"""Models: plain ``nn.Module``s from inputs to logits. They know nothing of clients or servers.

``zoo`` has the table of names and the check for models from outside; one file per kind of model; ``layers/`` holds
their parts.
"""
