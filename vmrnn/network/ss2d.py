"""SS2D: the 2-D selective-scan layer of VMamba (arXiv 2401.10166) as VMRNN uses it."""

import math

import torch
import torch.nn as nn

from vmrnn.network.kernels import UsesKernels
from vmrnn.network.linear import linear
from vmrnn.scan import DIRECTIONS

DT_MIN, DT_MAX = 1e-3, 1e-1  # range of the step sizes at initialisation
EXPAND = 2  # inner channels per channel


class SS2D(UsesKernels):
    """(B, H, W, C) -> (B, H, W, C); H and W are free.

    d_model  width C
    d_state  states per channel, N
    dropout  dropout of the output
    scan     scan back end, see vmrnn.scan

    Parameter names and shapes are those of the published checkpoints. `A_logs`, `Ds` and `dt_projs_bias` are marked
    `_no_weight_decay`: decay would pull time constants and step sizes towards arbitrary values.
    """

    def __init__(self, d_model, *, d_state=16, dropout=0.0, scan="auto"):
        super().__init__(scan, d_state)
        K, Di, N, R = DIRECTIONS, EXPAND * d_model, d_state, math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * Di, bias=False)
        self.conv2d = nn.Conv2d(Di, Di, 3, padding=1, groups=Di)
        self.x_proj_weight = nn.Parameter(torch.empty(K, R + 2 * N, Di).uniform_(-(Di**-0.5), Di**-0.5))
        # This range keeps the expanded step sizes at the scale of dt_low, whatever R is.
        self.dt_projs_weight = nn.Parameter(torch.empty(K, Di, R).uniform_(-(R**-0.5), R**-0.5))
        # softplus(bias) is log-uniform in [DT_MIN, DT_MAX]: channels start with memories of 10 to 1000 steps.
        dt = torch.exp(torch.empty(K, Di).uniform_(math.log(DT_MIN), math.log(DT_MAX)))
        self.dt_projs_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        # S4D-real: state n of every channel decays at rate n (arXiv 2206.11893).
        self.A_logs = nn.Parameter(torch.log(torch.arange(1, N + 1.0)).repeat(K * Di, 1))
        self.Ds = nn.Parameter(torch.ones(K * Di))
        for parameter in (self.A_logs, self.Ds, self.dt_projs_bias):
            parameter._no_weight_decay = True
        self.out_norm = nn.LayerNorm(Di)
        self.out_proj = nn.Linear(Di, d_model, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, u):
        kernels, norm = self.kernels, self.out_norm
        x, z = kernels.in_proj(u, self.in_proj.weight)
        x = kernels.conv_silu(x, self.conv2d.weight, self.conv2d.bias)
        # x_proj is linear per position: one product in row-major order serves all four directions.
        dbl = linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (DIRECTIONS, -1))
        y = kernels.scan(
            x,
            dbl,
            self.dt_projs_weight,
            self.dt_projs_bias,
            self.A_logs.view(DIRECTIONS, -1, self.d_state),
            self.Ds.view(DIRECTIONS, -1),
        )
        return self.dropout(kernels.norm_gate_linear(y, z, norm.weight, norm.bias, norm.eps, self.out_proj.weight))
