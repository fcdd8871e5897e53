"""onpolicy.py: what is kept of each picture is what autograd says of it alone."""
import pytest
import torch

from onpolicy import by_picture

LAYERS = [(torch.nn.Linear(5, 3, bias=False), (6, 7, 5)),                       # tokens
          (torch.nn.Linear(5, 3, bias=False), (6, 5)),                          # a timestep's embedding
          (torch.nn.Conv2d(4, 3, 3, padding=1, bias=False), (6, 4, 8, 8)),
          (torch.nn.Conv2d(4, 3, 3, stride=2, padding=1, bias=False), (6, 4, 8, 8)),
          (torch.nn.Conv2d(4, 3, 1, bias=False), (6, 4, 8, 8))]


@pytest.mark.parametrize("layer, shape", LAYERS)
def test_a_pictures_gradient_is_that_of_its_rows_alone(layer, shape):
    """6 rows are 3 pictures in two halves: picture i has rows i and i + 3."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    output = layer(x)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    found = by_picture(layer, x, grad, 3)
    for i in range(3):
        rows = [i, i + 3]
        alone, = torch.autograd.grad((layer(x[rows]) * grad[rows]).sum(), layer.weight)
        assert found[i].shape == alone.shape and torch.allclose(found[i], alone, atol=1e-5)
