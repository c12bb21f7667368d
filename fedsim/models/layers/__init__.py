"""Parts of models: normalisation, layers that draw random numbers, and the protocol by which those get their keys."""
