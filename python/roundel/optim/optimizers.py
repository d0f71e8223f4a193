"""The optimizers: torch.optim's arguments and defaults for each rule, then **options, which are those of `Options`.

`foreach`, `fused` and `capturable` are accepted as torch's and change nothing: every step is fused.
"""

from __future__ import annotations

from typing import Any

from roundel.errors import InvalidArgumentError
from roundel.optim.base import FusedOptimizer
from roundel.optim.options import Default, Options, check_betas, check_numbers
from roundel.optim.plans import Rule

__all__ = ["LAMB", "LARS", "SGD", "Adagrad", "Adam", "AdamW", "Lion", "RMSprop"]

_MOMENTUM, _NESTEROV = ("momentum", "momentum"), ("nesterov", "nesterov")
RULES = {
    "sgd": Rule("sgd", (_MOMENTUM, _NESTEROV), keeps_step=False),
    "adam": Rule("adam", (("amsgrad", "amsgrad"), ("decoupled", "decoupled_weight_decay"))),
    "rmsprop": Rule("rmsprop", (("centered", "centered"), _MOMENTUM)),
    "adagrad": Rule("adagrad"),
    "lion": Rule("lion", keeps_step=False),
    "lamb": Rule("lamb"),
    "lars": Rule("lars", (_MOMENTUM, _NESTEROV), keeps_step=False),
}

# Defaults that differ between torch.optim and Keras 3; where torch has no such optimizer: its paper's.
_LR_SGD, _LR_ADAPTIVE, _LR_LION = Default(1e-3, keras=1e-2), Default(1e-2, keras=1e-3), Default(1e-4, keras=1e-3)
_EPS, _EPS_ADAGRAD, _EPS_LAMB = Default(1e-8, keras=1e-7), Default(1e-10, keras=1e-7), Default(1e-6, keras=1e-7)
_ALPHA, _SUM = Default(0.99, keras=0.9), Default(0, keras=0.1)
_DECAY_ADAMW, _DECAY_LAMB = Default(1e-2, keras=4e-3), Default(1e-2, keras=0)


def _defaults(options: Options, **values: Any) -> dict[str, Any]:
    return {name: v.chosen(options.semantics) if isinstance(v, Default) else v for name, v in values.items()}


class SGD(FusedOptimizer):
    """torch.optim.SGD, or Keras's: there lr is inside the momentum buffer, weight decay apart from the gradient."""

    rule = RULES["sgd"]

    def __init__(
        self,
        params,
        lr=_LR_SGD,
        momentum=0,
        dampening=0,
        weight_decay=0,
        nesterov=False,
        *,
        maximize=False,
        foreach=None,
        differentiable=False,
        fused=None,
        **options,
    ):
        options = Options(**options)
        check_numbers(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise InvalidArgumentError("Nesterov momentum requires a momentum and zero dampening")  # torch's words
        if options.semantics == "keras" and dampening != 0:
            raise InvalidArgumentError(f"dampening: expected 0 with semantics='keras', which has none, got {dampening}")
        defaults = _defaults(
            options,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults, options)


class Adam(FusedOptimizer):
    """torch.optim.Adam, or Keras's: there eps is added before the bias correction, weight decay apart from the gradient."""

    rule = RULES["adam"]

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=_EPS,
        weight_decay=0,
        amsgrad=False,
        *,
        foreach=None,
        maximize=False,
        capturable=False,
        differentiable=False,
        fused=None,
        decoupled_weight_decay=False,
        **options,
    ):
        options = Options(**options)
        check_numbers(lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas(betas)
        defaults = _defaults(
            options,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        super().__init__(params, defaults, options)


class AdamW(Adam):
    """torch.optim.AdamW: Adam with weight decay apart from the gradient (Loshchilov and Hutter 2019), or Keras's."""

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=_EPS,
        weight_decay=_DECAY_ADAMW,
        amsgrad=False,
        *,
        maximize=False,
        foreach=None,
        capturable=False,
        differentiable=False,
        fused=None,
        **options,
    ):
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **options,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # also where an Adam was saved


class RMSprop(FusedOptimizer):
    """torch.optim.RMSprop, or Keras's: there eps is inside the root, lr inside the momentum buffer."""

    rule = RULES["rmsprop"]

    def __init__(
        self,
        params,
        lr=_LR_ADAPTIVE,
        alpha=_ALPHA,
        eps=_EPS,
        weight_decay=0,
        momentum=0,
        centered=False,
        capturable=False,
        foreach=None,
        maximize=False,
        differentiable=False,
        **options,
    ):
        options = Options(**options)
        check_numbers(lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
        defaults = _defaults(
            options,
            lr=lr,
            momentum=momentum,
            alpha=alpha,
            eps=eps,
            centered=centered,
            weight_decay=weight_decay,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
        )
        super().__init__(params, defaults, options)


class Adagrad(FusedOptimizer):
    """torch.optim.Adagrad, or Keras's: there eps is inside the root, and lr_decay does not exist.

    State is made at a parameter's first step; torch's makes it at once, for frozen parameters too.
    """

    rule = RULES["adagrad"]

    def __init__(
        self,
        params,
        lr=_LR_ADAPTIVE,
        lr_decay=0,
        weight_decay=0,
        initial_accumulator_value=_SUM,
        eps=_EPS_ADAGRAD,
        foreach=None,
        *,
        maximize=False,
        differentiable=False,
        fused=None,
        **options,
    ):
        options = Options(**options)
        check_numbers(
            lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, initial_accumulator_value=initial_accumulator_value, eps=eps
        )
        if options.semantics == "keras" and lr_decay != 0:
            raise InvalidArgumentError(f"lr_decay: expected 0 with semantics='keras', which has none, got {lr_decay}")
        defaults = _defaults(
            options,
            lr=lr,
            lr_decay=lr_decay,
            eps=eps,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults, options)


class Lion(FusedOptimizer):
    """Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023: the sign of an interpolated momentum."""

    rule = RULES["lion"]

    def __init__(
        self,
        params,
        lr=_LR_LION,
        betas=(0.9, 0.99),
        weight_decay=0,
        *,
        maximize=False,
        foreach=None,
        capturable=False,
        differentiable=False,
        fused=None,
        **options,
    ):
        options = Options(**options)
        check_numbers(lr=lr, weight_decay=weight_decay)
        check_betas(betas)
        defaults = _defaults(
            options,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults, options)


class LAMB(FusedOptimizer):
    """You et al., "Large Batch Optimization for Deep Learning", 2020: Adam's step, as long as the parameter's norm says.

    Keras's leaves weight decay out of the ratio of norms. Every parameter is a layer of its own.
    """

    rule = RULES["lamb"]

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=_EPS_LAMB,
        weight_decay=_DECAY_LAMB,
        *,
        maximize=False,
        foreach=None,
        capturable=False,
        differentiable=False,
        fused=None,
        **options,
    ):
        options = Options(**options)
        check_numbers(lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas(betas)
        defaults = _defaults(
            options,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults, options)


class LARS(FusedOptimizer):
    """You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", 2017: SGD with a rate for every layer.

    The rate is trust_coefficient * |w| / (|g| + weight_decay * |w| + eps), 1 where |w| or |g| is 0.
    """

    rule = RULES["lars"]

    def __init__(
        self,
        params,
        lr=1.0,
        momentum=0.9,
        weight_decay=0,
        nesterov=False,
        trust_coefficient=1e-3,
        eps=1e-8,
        *,
        maximize=False,
        foreach=None,
        differentiable=False,
        fused=None,
        **options,
    ):
        options = Options(**options)
        check_numbers(lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient, eps=eps)
        if nesterov and momentum <= 0:
            raise InvalidArgumentError("nesterov=True: expected a momentum above 0, got 0")
        defaults = _defaults(
            options,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            trust_coefficient=trust_coefficient,
            eps=eps,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults, options)
