"""Fused optimizers for torch: torch.optim's, with one native pass over memory for a step of any number of tensors.

import roundel.optim
optimizer = roundel.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)                  # instead of torch.optim.AdamW
optimizer = roundel.optim.AdamW(model.parameters(), lr=1e-3, master_weights=True, max_norm=1.0)  # 16-bit model, clipping inside
"""

from roundel.optim.base import FusedOptimizer
from roundel.optim.clip import clip_grad_norm_
from roundel.optim.optimizers import LAMB, LARS, SGD, Adagrad, Adam, AdamW, Lion, RMSprop
from roundel.optim.options import Options
from roundel.optim.scaler import LossScaler

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "FusedOptimizer",
    "Lion",
    "LossScaler",
    "Options",
    "RMSprop",
    "clip_grad_norm_",
]
