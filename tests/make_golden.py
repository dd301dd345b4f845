"""Write tests/golden/*.npz: small networks by the reference scan in float64, fixed seeds.

    python -m tests.make_golden

Run it only when the networks are meant to change; the published code's own numbers then decide.
"""

import json
from pathlib import Path

import numpy as np
import torch

from functions import RolloutLoss
from vmrnn.network import build_model
from vmrnn.rollout import rollout

CONFIGS = {
    "b_patch8": {"model": "VMRNN-B", "img_size": [32, 16], "patch_size": 8, "in_chans": 2, "embed_dim": 32,
                 "depths": [2, 1]},
    "d_odd": {"model": "VMRNN-D", "img_size": [24, 8], "patch_size": 2, "in_chans": 1, "embed_dim": 12,
              "depths_downsample": [1, 2], "depths_upsample": [2, 1]},
}  # fmt: skip


def main():
    folder = Path(__file__).parent / "golden"
    folder.mkdir(exist_ok=True)
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = build_model(
            config["model"], patch_size=config["patch_size"],
            in_chans=config["in_chans"], embed_dim=config["embed_dim"], depths=config.get("depths"),
            depths_down=config.get("depths_downsample"), depths_up=config.get("depths_upsample"), scan="reference",
        )  # fmt: skip
        with torch.no_grad():  # away from zero biases and equal rows, rounded to what the file keeps
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        model.double().eval()
        shape = (2, 3, config["in_chans"], *config["img_size"])
        inputs, targets = (torch.rand(shape).double() for _ in range(2))
        outputs = rollout(model, inputs, 3)
        loss = RolloutLoss()(outputs, inputs, targets)
        loss.backward()
        arrays = {"inputs": inputs, "targets": targets, "outputs": outputs.detach(), "loss": loss.detach()}
        arrays |= {f"state/{key}": value for key, value in model.state_dict().items()}
        arrays |= {f"grad/{key}": p.grad for key, p in model.named_parameters()}
        np.savez_compressed(
            folder / f"{name}.npz",
            config=json.dumps(config),
            **{key: value.numpy().astype(np.float32) for key, value in arrays.items()},
        )


if __name__ == "__main__":
    main()
