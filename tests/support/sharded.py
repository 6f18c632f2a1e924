"""Started by accelerate's launcher: makes accelerate shard CPU ranks as it does GPUs.

Accelerate chooses FSDP only for ranks with GPUs; the sharding itself works on any device.
"""

import runpy
import sys

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor


class Sharding(Accelerator):
    """Prints after ``prepare`` how many parameters this rank holds."""

    def prepare(self, model, *others):
        model, *others = super().prepare(model, *others)
        shards = [p for p in model.parameters() if isinstance(p, DTensor)]
        here, whole = sum(p.to_local().numel() for p in shards), sum(p.numel() for p in shards)
        assert len(shards) == len(list(model.parameters()))
        assert not any(isinstance(buffer, DTensor) for buffer in model.buffers())
        self.print(f"{here} of {whole} parameters on rank 0")
        return model, *others


PartialState(cpu=True)._shared_state["distributed_type"] = DistributedType.MULTI_GPU
sys.modules["accelerate"].Accelerator = Sharding
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
