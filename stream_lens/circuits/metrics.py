"""Metrics: one number from a run's last logits, for attribution and ablation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Logits = Float[Tensor, "batch last_logits vocab"]
MetricFunction = Callable[[Tensor], Tensor]
"""From the logits of the last positions [batch, last_logits, vocab] to a scalar. Sum over the batch, do not average:
then every text's scores are those that it would have alone."""


@dataclass(frozen=True, eq=False)
class Metric:
    """A metric that knows which logits it reads, so that tools make those only.

    Attributes:
        name: for tables and figures.
        positions: how many of the last positions it reads.
        compute: from their logits to a scalar.
        ending: token ids [batch or 1, n] that the input must end with; None for any input.
    """

    name: str
    positions: int
    compute: MetricFunction
    ending: Int[Tensor, "batch n"] | None = None

    def __call__(self, logits: Logits) -> Float[Tensor, ""]:
        return self.compute(logits[:, -self.positions :])


def logit_difference(token_a: int, token_b: int) -> Metric:
    """Logit of token a minus that of token b at the last position, summed over the batch."""

    def compute(logits: Tensor) -> Tensor:
        return (logits[:, -1, token_a] - logits[:, -1, token_b]).sum()

    return Metric(f"logit difference of tokens {token_a} and {token_b}", 1, compute)


def answer_log_probability(answer: Sequence[int] | Int[Tensor, "*batch n"]) -> Metric:
    """Natural log of the probability of a whole answer after a prompt, summed over the batch.

    The input must be the prompt and the answer without its last token, as `with_answer` makes it; tools check that it
    is.
    """
    expected = torch.as_tensor(answer, dtype=torch.long)
    expected = expected if expected.ndim == 2 else expected[None]
    if expected.ndim != 2 or not expected.shape[1]:
        raise ValueError(f"an answer is token ids [n] or [batch, n], at least 1; got shape {list(expected.shape)}.")

    def compute(logits: Tensor) -> Tensor:
        index = expected.to(logits.device).expand(logits.shape[0], -1)[..., None]
        return log_probabilities(logits).gather(-1, index).sum()

    return Metric("answer log-probability", expected.shape[1], compute, expected[:, :-1])


def with_answer(
    prompt: Int[Tensor, "batch position"], answer: Sequence[int] | Int[Tensor, "*batch n"]
) -> Int[Tensor, "batch longer"]:
    """The prompt and its answer but for the last token: what `answer_log_probability` is measured on."""
    tokens = torch.as_tensor(answer, dtype=prompt.dtype, device=prompt.device)
    tokens = tokens.expand(prompt.shape[0], -1) if tokens.ndim == 1 else tokens
    return torch.cat([prompt, tokens[:, :-1]], 1)


def kl_to(dense_logits: Logits) -> Metric:
    """KL(dense ‖ this run) in nats, summed over the batch and over the last positions that `dense_logits` covers."""
    reference = log_probabilities(dense_logits.detach())

    def compute(logits: Tensor) -> Tensor:
        if logits.shape != reference.shape:
            raise ValueError(
                f"kl_to was given dense logits of shape {list(reference.shape)}, and this run has {list(logits.shape)}."
            )
        return kl_divergence(reference.to(logits.device), log_probabilities(logits)).sum()

    return Metric("KL to the dense run", reference.shape[1], compute)


def log_probabilities(logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
    """Natural, in float32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def kl_divergence(log_p: Float[Tensor, "*rows vocab"], log_q: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows"]:
    """KL(p ‖ q) in nats of each row. Tokens that p rules out count nothing, whatever q says of them."""
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -torch.inf, 0.0, terms).sum(-1)


def positions_read(metric: MetricFunction, tokens: Int[Tensor, "batch position"], last_logits: int | None) -> int:
    """How many of the last positions' logits to make.

    Raises:
        ValueError: fewer were asked for than the metric reads; the input is not what the metric is about.
    """
    if not isinstance(metric, Metric):
        return 1 if last_logits is None else last_logits
    if last_logits is not None and last_logits < metric.positions:
        raise ValueError(
            f"last_logits={last_logits}, but the metric ({metric.name}) reads {metric.positions}: leave it out."
        )
    ending = metric.ending
    if ending is not None and ending.shape[1]:
        tail = tokens[:, -ending.shape[1] :].cpu()
        if tail.shape[1] != ending.shape[1] or not bool((tail == ending.cpu()).all()):
            raise ValueError(
                f"the input must end with the answer's first {ending.shape[1]} tokens, which the metric reads the "
                "prediction of: give tokens=with_answer(prompt, answer)."
            )
    return last_logits or metric.positions


def scalar(metric: MetricFunction, logits: Logits) -> Float[Tensor, ""]:
    """The metric's value. `ValueError` unless it is one number."""
    value = metric(logits)
    if not isinstance(value, Tensor) or value.numel() != 1:
        given = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"a metric must turn logits into a tensor of one number; it gave {given}.")
    return value.reshape(())
