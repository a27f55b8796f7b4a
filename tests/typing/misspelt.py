"""Planted mistakes: each line that ends in `# error:` must be reported by mypy."""

from __future__ import annotations

from correct import Both, FeedForward, Norm

p = FeedForward.Params(hiden_dim=3)  # error: call-arg
p = FeedForward.Params(hidden_dim="3")  # error: arg-type
p.hiden_dim = 3  # error: attr-defined
p.hidden_dim = "3"  # error: assignment
p.kind = "gatet"  # error: assignment
p.norm = 3  # error: assignment
print(p.norm.epz)  # error: attr-defined
p.layers["x"] = FeedForward.Params()  # error: assignment
q = Both.Params(3)  # error: call-arg
width: str = q.norm.dim  # error: assignment


class LayerNorm(Norm):
    class Params(Norm.Params):
        bias: bool = "yes"  # error: assignment

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        print(p.bais)  # error: attr-defined
