"""MinGRU: a gated linear recurrence that is computed for all frames at once.

`Were RNNs All We Needed?` (Feng et al. 2024, https://arxiv.org/abs/2410.01201), in the form of its
appendix B: h_t = (1 - z_t) h_{t-1} + z_t g(c_t), where gate z_t = sigmoid(W_z x_t) and candidate
c_t = W_c x_t depend on the frame alone, and g is positive. The authors sum logarithms; linear maps
in pairs need none, lose no digits in long clips, and have a place in ONNX.
"""

import torch
from torch import nn

__all__ = ["MinGRU", "linear_scan"]


def linear_scan(
    keep: torch.Tensor, add: torch.Tensor, start: torch.Tensor | None = None
) -> torch.Tensor:
    """h_t = keep_t h_{t-1} + add_t for all t, in log2(T) steps instead of T.

    Two frames in a row are one linear map, four are two of those, and so on: the parallel prefix
    sum of Hillis and Steele (1986, https://doi.org/10.1145/7902.7903), of linear maps.

    Args:
        keep: (B, T, D), from 0 to 1.
        add: (B, T, D).
        start: h_0 (B, D), 0 if left out.

    Returns:
        h_1 to h_T (B, T, D).

    Example:
        >>> half = torch.full((1, 3, 1), 0.5)
        >>> linear_scan(half, half).flatten().tolist()
        [0.5, 0.75, 0.875]
    """
    reach = 1
    while reach < add.shape[1]:
        first = add[:, :reach], keep[:, :reach]
        add = torch.cat([first[0], add[:, reach:] + keep[:, reach:] * add[:, :-reach]], 1)
        keep = torch.cat([first[1], keep[:, reach:] * keep[:, :-reach]], 1)
        reach *= 2
    return add if start is None else add + keep * start[:, None]


class MinGRU(nn.Module):
    """Layers of minGRU, called as `nn.GRU(batch_first=True)` is.

    Args:
        input_size: Width of a frame's vector.
        hidden_size: Width of the state, of each direction.
        num_layers: Layers, one upon the other.
        batch_first: True, the only layout it has.
        dropout: Behind each layer but the last.
        bidirectional: Whether the clip is read backwards too.

    Example:
        >>> out, state = MinGRU(4, 5)(torch.randn(2, 7, 4))
        >>> out.shape, state.shape
        (torch.Size([2, 7, 5]), torch.Size([1, 2, 5]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ):
        super().__init__()
        assert batch_first
        self.drop = nn.Dropout(dropout)
        self.directions = 2 if bidirectional else 1
        self.layers = nn.ModuleList()
        for _ in range(num_layers):
            for _ in range(self.directions):
                self.layers.append(nn.Linear(input_size, 2 * hidden_size))  # gate, candidate
            input_size = hidden_size * self.directions

    def forward(
        self,
        x: torch.Tensor,
        state: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs and state.

        Args:
            x: (B, T, input_size).
            state: (layers * directions, B, hidden_size), None at the beginning.
            lengths: (B,) valid frames of each clip, all of them if left out.

        Returns:
            (B, T, hidden_size * directions), meaningless behind the lengths, and the state after
            each clip's last valid frame.
        """
        states = []
        for start in range(0, len(self.layers), self.directions):
            outputs = []
            for number in range(start, start + self.directions):
                given = None if state is None else state[number]
                backwards = number > start
                y = _reverse(x, lengths) if backwards else x
                h = self._scan(self.layers[number](y), given)
                states.append(_at_end(h, lengths))
                outputs.append(_reverse(h, lengths) if backwards else h)
            x = torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]
            if start + self.directions < len(self.layers):
                x = self.drop(x)
        return x, torch.stack(states)

    def _scan(self, y: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        # products of many are no matter for half precision
        exact = torch.promote_types(y.dtype, torch.float32)
        gate, candidate = y.to(exact).chunk(2, -1)
        # g(c) = c + 0.5 above 0, sigmoid(c) below
        g = torch.where(candidate >= 0, candidate + 0.5, candidate.sigmoid())
        start = None if state is None else state.to(exact)
        return linear_scan((-gate).sigmoid(), gate.sigmoid() * g, start).to(y.dtype)


def _reverse(x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """The valid frames (B, T, D) in the other direction."""
    if lengths is None:
        return x.flip(1)
    time = torch.arange(x.shape[1], device=x.device)
    source = (lengths[:, None] - 1 - time).clamp(min=0)
    return x.gather(1, source[:, :, None].expand(-1, -1, x.shape[2]))


def _at_end(h: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """(B, T, D) at each clip's last valid frame (B, D)."""
    if lengths is None:
        return h[:, -1]
    return h.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, h.shape[2]))[:, 0]
