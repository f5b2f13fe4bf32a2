"""The discriminator's scores know nothing of the batch; LPIPS reads the package's weights and is its formula."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from latentfm.errors import InputError
from latentfm.training.vae.networks import LPIPS, VGG_SLICES, Discriminator, Reconstruction, groups_of, names_in_package


def test_a_patchs_score_depends_on_its_picture_alone():
    torch.manual_seed(0)
    judge = Discriminator(width=16, layers=2)
    pictures = torch.rand(3, 3, 32, 40)
    together = judge(pictures)
    assert together.shape == (3, 1, 6, 8)
    for row in range(3):
        torch.testing.assert_close(judge(pictures[row : row + 1])[0], together[row])
    assert [f.shape[1] for f in judge.features(pictures)] == [16, 32, 64]


def test_any_width_has_groups_that_divide_it():
    for width in (1, 7, 11, 100, 64):
        assert Discriminator(width, 2)(torch.zeros(1, 3, 16, 16)).shape == (1, 1, 2, 2)
    assert [groups_of(width) for width in (8, 64, 200, 512)] == [1, 4, 10, 32]


def test_a_patch_is_as_large_as_is_said():
    """70 pixels with three halvings, 34 with two: what moves a score, and nothing beyond."""
    for layers, size in ((3, 70), (2, 34)):
        judge = Discriminator(width=8, layers=layers)
        for stage in judge.stages[1:]:
            stage[1] = nn.Identity()  # normalisation sees the whole picture
        pictures = torch.rand(1, 3, 128, 128, requires_grad=True)
        score = judge(pictures)
        score[0, 0, score.shape[2] // 2, score.shape[3] // 2].backward()
        seen = pictures.grad[0].abs().sum(0)
        assert (seen.sum(0) > 0).sum() == size and (seen.sum(1) > 0).sum() == size


def test_the_distance_in_features_is_nothing_between_equals_and_pulls():
    torch.manual_seed(0)
    judge, target = Discriminator(width=8, layers=2).requires_grad_(False), torch.rand(2, 3, 32, 32)
    assert judge.distance(target, target).tolist() == [0.0, 0.0]
    output = torch.rand(2, 3, 32, 32).requires_grad_()
    distance = judge.distance(output, target)
    distance.sum().backward()
    assert distance.shape == (2,) and output.grad.abs().max() > 0
    nearer = judge.distance(output.detach() - 0.1 * output.grad / output.grad.abs().max(), target)
    assert (nearer < distance).all()


def test_one_draw_is_decoded():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pixels, noise = torch.rand(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
    output, mean, logvar = Reconstruction(vae)(pixels, noise)
    posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close((mean, logvar), (posterior.mean, posterior.logvar))
    torch.testing.assert_close(output, vae.decode(posterior.mean + posterior.std * noise).sample)


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory):
    """Random weights under the names of the package's state, the repeated ones too."""
    torch.manual_seed(0)
    state = {name: 0.05 * torch.randn_like(own) for name, own in zip(names_in_package(), LPIPS().parameters(), strict=True)}
    state |= {name: value.abs() for name, value in state.items() if name.startswith("lin")}
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(state | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, path)
    return path, state


def test_lpips_is_its_formula(lpips_file):
    """VGG16's features after each stage, normalised over channels, their squared difference weighted, averaged over places."""
    path, state = lpips_file
    a, b = torch.rand(2, 2, 3, 32, 48) * 2 - 1
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])[..., None, None]
    scaled = [(x - shift) / scale for x in (a, b)]
    total, names = 0.0, list(names_in_package())
    for number, widths in enumerate(VGG_SLICES):
        stage = nn.Sequential(*([nn.MaxPool2d(2)] if number else []), *[nn.ReLU() for _ in widths])
        features = []
        for x in scaled:
            x = stage[0](x) if number else x
            for place in range(len(widths)):
                weight, bias = names[2 * (sum(map(len, VGG_SLICES[:number])) + place) :][:2]
                x = torch.relu(nn.functional.conv2d(x, state[weight], state[bias], padding=1))
            features.append(x)
        scaled = features
        one, other = (x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for x in features)
        total = total + (state[f"lin{number}.model.1.weight"] * (one - other).pow(2)).sum(1).mean((1, 2))
    torch.testing.assert_close(LPIPS.load(path)(a, b), total, rtol=1e-4, atol=1e-6)
    assert LPIPS.load(path)(a, a).abs().max() < 1e-9


def test_other_files_are_refused(tmp_path, lpips_file):
    with pytest.raises(InputError, match="there is no file"):
        LPIPS.load(tmp_path / "none.safetensors")
    (tmp_path / "vgg.pth").write_bytes(b"\x80\x02}")
    with pytest.raises(InputError, match="pickle"):
        LPIPS.load(tmp_path / "vgg.pth")
    save_file({"net.slice1.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "half.safetensors")
    with pytest.raises(InputError, match="it lacks net.slice1.0.bias"):
        LPIPS.check(tmp_path / "half.safetensors")
