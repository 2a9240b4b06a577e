"""What the server does with the clients' mean: FedAvg, FedAvgM, FedAdagrad, FedYogi, FedAdam.

Each rule maps ``(x_t, mean_k w_k)`` to ``x_{t+1}`` through the pseudo-gradient
``Delta_t = mean_k w_k - x_t``.

References:
    McMahan et al. (2017), Communication-Efficient Learning of Deep Networks from Decentralized
    Data, Algorithm 1.
    https://arxiv.org/abs/1602.05629
    Hsu, Qi and Brown (2019), Measuring the Effects of Non-Identical Data Distribution (FedAvgM).
    https://arxiv.org/abs/1909.06335
    Reddi et al. (2021), Adaptive Federated Optimization, Algorithm 2.
    https://arxiv.org/abs/2003.00295
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class ServerOptimizer(ABC):
    """Turns the clients' mean into the next global adapter; keeps its own state between rounds."""

    def __init__(self) -> None:
        """Start without state."""
        self.state: dict[str, Tensor] = {}

    @abstractmethod
    def step(self, current: Tensor, mean: Tensor) -> Tensor:
        """Next global adapter.

        Args:
            current: Global adapter x_t that the clients started from, flat float32, shape
                ``(num_params,)``.
            mean: Weighted mean of the adapters that they returned, same shape.

        Returns:
            Global adapter x_{t+1}, a new tensor of the same shape.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Moments to keep in a checkpoint, by name."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.state = dict(state)

    def _moment(self, name: str, like: Tensor, *, initial: float = 0.0) -> Tensor:
        """The moment `name` on the device of `like`; before the first round, all `initial`."""
        if name not in self.state:
            return torch.full_like(like, initial)
        return self.state[name].to(like.device)


class FedAvg(ServerOptimizer):
    """``x_{t+1} = x_t + learning_rate * Delta_t`` (McMahan et al. 2017).

    Args:
        learning_rate: Server step size; 1 takes the clients' mean as it is.
    """

    def __init__(self, learning_rate: float = 1.0) -> None:
        super().__init__()
        self.learning_rate = _positive("learning_rate", learning_rate)

    def step(self, current: Tensor, mean: Tensor) -> Tensor:
        """See the class."""
        if self.learning_rate == 1.0:  # exactly the mean, without the rounding of x + (mean - x)
            return mean.clone()
        return current + self.learning_rate * (mean - current)


class FedAvgM(ServerOptimizer):
    """Server momentum (Hsu et al. 2019).

    ``v_t = momentum * v_{t-1} + Delta_t``, ``x_{t+1} = x_t + learning_rate * v_t``.

    Args:
        momentum: Share of the last step that is kept, 0 to below 1.
        learning_rate: Server step size.
    """

    def __init__(self, momentum: float = 0.9, learning_rate: float = 1.0) -> None:
        super().__init__()
        self.momentum = _below_one("momentum", momentum)
        self.learning_rate = _positive("learning_rate", learning_rate)

    def step(self, current: Tensor, mean: Tensor) -> Tensor:
        """See the class."""
        velocity = self.momentum * self._moment("velocity", current) + (mean - current)
        self.state["velocity"] = velocity
        return current + self.learning_rate * velocity


class _Adaptive(ServerOptimizer):
    """Algorithm 2 of Reddi et al. (2021); members differ in the second moment ``v_t``.

    ``m_t = beta1 * m_{t-1} + (1 - beta1) * Delta_t``, ``x_{t+1} = x_t + learning_rate * m_t /
    (sqrt(v_t) + tau)``, ``v_{-1} = tau^2``.
    """

    def __init__(self, learning_rate: float, beta1: float, tau: float) -> None:
        super().__init__()
        self.learning_rate = _positive("learning_rate", learning_rate)
        self.beta1 = _below_one("beta1", beta1)
        self.tau = _positive("tau", tau)

    @abstractmethod
    def _second_moment(self, previous: Tensor, delta: Tensor) -> Tensor: ...

    def step(self, current: Tensor, mean: Tensor) -> Tensor:
        """See the class."""
        delta = mean - current
        first = self.beta1 * self._moment("first", current) + (1 - self.beta1) * delta
        second = self._second_moment(self._moment("second", current, initial=self.tau**2), delta)
        self.state = {"first": first, "second": second}
        return current + self.learning_rate * first / (second.sqrt() + self.tau)


class FedAdagrad(_Adaptive):
    """``v_t = v_{t-1} + Delta_t^2`` (Reddi et al. 2021).

    Args:
        learning_rate: Server step size eta.
        beta1: Momentum of the first moment, 0 to below 1; the paper uses 0 here.
        tau: Degree of adaptivity, > 0: the smaller, the more adaptive.
    """

    def __init__(self, learning_rate: float = 1e-2, beta1: float = 0.0, tau: float = 1e-3) -> None:
        super().__init__(learning_rate, beta1, tau)

    def _second_moment(self, previous: Tensor, delta: Tensor) -> Tensor:
        return previous + delta.square()


class FedAdam(_Adaptive):
    """``v_t = beta2 * v_{t-1} + (1 - beta2) * Delta_t^2`` (Reddi et al. 2021).

    Args:
        learning_rate: Server step size eta.
        beta1: Momentum of the first moment, 0 to below 1.
        beta2: Momentum of the second moment, 0 to below 1.
        tau: Degree of adaptivity, > 0: the smaller, the more adaptive.
    """

    def __init__(
        self,
        learning_rate: float = 1e-2,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
    ) -> None:
        super().__init__(learning_rate, beta1, tau)
        self.beta2 = _below_one("beta2", beta2)

    def _second_moment(self, previous: Tensor, delta: Tensor) -> Tensor:
        return self.beta2 * previous + (1 - self.beta2) * delta.square()


class FedYogi(_Adaptive):
    """``v_t = v_{t-1} - (1 - beta2) * Delta_t^2 * sign(v_{t-1} - Delta_t^2)`` (Reddi et al. 2021).

    Args:
        learning_rate: Server step size eta.
        beta1: Momentum of the first moment, 0 to below 1.
        beta2: Momentum of the second moment, 0 to below 1.
        tau: Degree of adaptivity, > 0: the smaller, the more adaptive.
    """

    def __init__(
        self,
        learning_rate: float = 1e-2,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
    ) -> None:
        super().__init__(learning_rate, beta1, tau)
        self.beta2 = _below_one("beta2", beta2)

    def _second_moment(self, previous: Tensor, delta: Tensor) -> Tensor:
        square = delta.square()
        return previous - (1 - self.beta2) * square * torch.sign(previous - square)


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} of the server optimizer is {value}; give a number above 0")
    return value


def _below_one(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(
            f"{name} of the server optimizer is {value}; give 0 or more and less than 1"
        )
    return value
