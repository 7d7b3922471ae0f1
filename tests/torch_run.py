"""One rank of a DDP run: trains, checkpoints every update, resumes if it can.

    python torch_run.py URL STEPS OUTPUT

Prints `resumed STEP`, then `durable STEP` for every third step; at the end the digest of what this
rank holds goes to OUTPUT, with its rank. Environment: see `rank_processes`.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rank_processes import leave_together
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import asymcheck_torch
from asymcheck import Always, AsymCheck


def main(url: str, steps: int, output: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(1)
    module = DistributedDataParallel(nn.Sequential(nn.Linear(64, 300), nn.Linear(300, 64)))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    torch.manual_seed(10 + rank)  # every rank draws its own data
    training = asymcheck_torch.attach(
        module,
        optimizer,
        url=url,
        strategy=AsymCheck(policy=Always("replay")),
        max_to_keep=3,
        max_chain=2,
        max_host_bytes=64 << 20,
        commit_timeout_s=60,
    )
    with training:
        begun = training.restore()
        print(f"resumed {begun}", flush=True)
        for step in range(begun + 1, steps + 1):
            data = torch.randn(8, 64)
            loss = (module(data) - data.roll(1, 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 3 == 0:  # else several are under way at once
                training.wait()
                print(f"durable {step}", flush=True)
    digest = hashlib.sha256()
    moments = [optimizer.state[parameter] for parameter in module.parameters()]
    states = [state[key] for state in moments for key in sorted(state)]
    for tensor in (*module.state_dict().values(), *states, torch.get_rng_state()):
        digest.update(torch.as_tensor(tensor).numpy().tobytes())
    output.with_suffix(f".{rank}").write_text(digest.hexdigest())
    leave_together()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
