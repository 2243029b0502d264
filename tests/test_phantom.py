"""The phantom and the fixtures do what other tests rely on."""

import numpy as np
import pytest
import torch
from phantom import centred_affine, head


def test_the_phantom_is_the_same_place_on_every_grid():
    fine = head((32, 40, 24), (2, 2, 2), edge=2)
    # Every second voxel, left-handed, axes permuted.
    turned_affine = fine.affine @ np.array([[0, -2, 0, 30], [2, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
    turned = head((20, 16, 12), affine=turned_affine, edge=2)
    expected = fine.data[30::-2, ::2, ::2].transpose(1, 0, 2)
    np.testing.assert_allclose(turned.data, expected, atol=1e-3)  # found: 0 (rounding), of hundreds


def test_the_phantom_is_a_head_that_no_flip_maps_to_itself(phantom):
    assert phantom.data.dtype == np.float32 and phantom.label.dtype == np.uint8
    assert phantom.data.min() == 0 and 150 < phantom.data.max() <= 200
    assert not phantom.data[0].any() and not phantom.data[:, :, -1].any(), "it fits into its grid"
    assert 0.05 < phantom.label.mean() < 0.4  # found: 0.07
    for axis in range(3):
        assert not np.array_equal(phantom.label, np.flip(phantom.label, axis))
    np.testing.assert_array_equal(phantom.affine, centred_affine(phantom.data.shape, phantom.spacing))


def test_an_unwritten_voxel_shows(poisoned):
    for empty in (np.empty((2, 3), np.float32), np.empty_like(np.ones(3)), torch.empty(4), torch.ones(2).new_empty(3)):
        assert bool(np.isnan(np.asarray(empty)).all())
    assert np.empty(2, np.int16).tolist() == [32767, 32767]
    assert torch.empty(2, dtype=torch.int32).tolist() == [2**31 - 1] * 2
    assert torch.empty(3, requires_grad=True).requires_grad
    out = torch.empty(5)
    out[:4] = 1
    with pytest.raises(AssertionError):
        assert torch.isfinite(out).all()
    assert np.zeros(3).tolist() == [0, 0, 0] and np.isfinite(np.arange(6.0).reshape(2, 3).T.copy()).all()


def test_golden_files_are_in_the_repository(golden):
    assert (golden / "README.md").is_file()
