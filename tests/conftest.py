"""One torch thread per process, so that results and timings do not depend on what else runs."""

import torch

torch.set_num_threads(1)
