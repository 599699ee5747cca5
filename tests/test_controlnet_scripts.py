"""Scripts shaped like ControlNet's published ones run with the ControlNet folder alone on sys.path.

Written for this test: their paths, imports and calls, on the tiny bundled model and without CUDA.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ControlNet.cldm.ddim import DDIMSampler
from ControlNet.cldm.model import MODELS_FOLDER, load_model
from tests import forks

pytestmark = [pytest.mark.xdist_group("scripts"), pytest.mark.long]  # its scripts are run once, not once a worker
FOLDER = MODELS_FOLDER.parent

CANNY = """
from share import *
import config

import einops
import numpy as np
import torch
from PIL import Image
from pytorch_lightning import seed_everything

from annotator.canny import CannyDetector
from annotator.util import HWC3, resize_image
from cldm.ddim_hacked import DDIMSampler
from cldm.model import create_model, load_state_dict

apply_canny = CannyDetector()
model = create_model('./models/cldm_tiny.yaml').cpu()
model.load_state_dict(load_state_dict('./models/cldm_tiny.safetensors', location='cpu'))
ddim_sampler = DDIMSampler(model)


def process(input_image, prompt, n_prompt, num_samples, resolution, ddim_steps, guess_mode, strength, scale, seed, eta):
    with torch.no_grad():
        img = resize_image(HWC3(input_image), resolution)
        H, W, C = img.shape
        detected_map = HWC3(apply_canny(img, 100, 200))
        control = torch.from_numpy(detected_map.copy()).float() / 255.0
        control = torch.stack([control for _ in range(num_samples)], dim=0)
        control = einops.rearrange(control, 'b h w c -> b c h w').clone()
        seed_everything(seed)
        if config.save_memory:
            model.low_vram_shift(is_diffusing=False)
        cond = {"c_concat": [control], "c_crossattn": [model.get_learned_conditioning([prompt] * num_samples)]}
        un_cond = {"c_concat": None if guess_mode else [control],
                   "c_crossattn": [model.get_learned_conditioning([n_prompt] * num_samples)]}
        shape = (4, H // 8, W // 8)
        if config.save_memory:
            model.low_vram_shift(is_diffusing=True)
        n = len(model.control_scales)
        guess_scales = [strength * (0.825 ** float(n - 1 - i)) for i in range(n)]
        model.control_scales = guess_scales if guess_mode else [strength] * n
        samples, intermediates = ddim_sampler.sample(ddim_steps, num_samples,
                                                     shape, cond, verbose=False, eta=eta,
                                                     unconditional_guidance_scale=scale,
                                                     unconditional_conditioning=un_cond)
        if config.save_memory:
            model.low_vram_shift(is_diffusing=False)
        x_samples = model.decode_first_stage(samples)
        x_samples = (einops.rearrange(x_samples, 'b c h w -> b h w c') * 127.5 + 127.5)
        x_samples = x_samples.cpu().numpy().clip(0, 255).astype(np.uint8)
    return [255 - detected_map] + [x_samples[i] for i in range(num_samples)]


image = np.array(Image.open('input.png'))
results = process(image, 'digit four', 'lowres', 2, 64, 5, False, 1.0, 9.0, 12, 0.0)
config.save_memory = True
results += process(image, 'digit four', 'lowres', 1, 64, 3, True, 1.0, 4.0, 12, 1.0)[1:]
np.save('results.npy', np.stack(results))
"""

ADD_CONTROL = """
import torch
from share import *
from cldm.model import create_model

model = create_model(config_path='./models/cldm_tiny.yaml')
pretrained_weights = torch.load('base.ckpt')
if 'state_dict' in pretrained_weights:
    pretrained_weights = pretrained_weights['state_dict']
scratch_dict = model.state_dict()
target_dict = {}
for k in scratch_dict.keys():
    copy_k = 'model.diffusion_' + k[len('control_'):] if k.startswith('control_') else k
    target_dict[k] = (pretrained_weights[copy_k] if copy_k in pretrained_weights else scratch_dict[k]).clone()
model.load_state_dict(target_dict, strict=True)
torch.save(model.state_dict(), 'ini.ckpt')
"""

TRANSFER = """
import torch
from share import *
from cldm.model import load_state_dict

base = load_state_dict('base.ckpt')
control = load_state_dict('ini.ckpt')
other = load_state_dict('other.ckpt')
final = {}
for key, p in control.items():
    if key.startswith(('first_stage_model', 'cond_stage_model')):
        final[key] = other[key]
        continue
    name = 'model.diffusion_' + key[len('control_'):] if key.startswith('control_') else key
    final[key] = p + other[name] - base[name] if name in other else p
torch.save(final, 'transferred.pth')
"""

TRAIN = """
from share import *

import pytorch_lightning as pl
import numpy as np
from torch.utils.data import DataLoader, Dataset
from cldm.logger import ImageLogger
from cldm.model import create_model, load_state_dict


class MyDataset(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, idx):
        rng = np.random.default_rng(idx)
        source = (rng.random((64, 64, 1)) > 0.9).repeat(3, axis=2).astype(np.float32)
        return dict(jpg=1.0 - 2.0 * source, txt='digit %d' % idx, hint=source)


model = create_model('./models/cldm_tiny.yaml').cpu()
model.load_state_dict(load_state_dict('ini.ckpt', location='cpu'))
model.learning_rate = 1e-3
model.sd_locked = True
model.only_mid_control = False
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

dataloader = DataLoader(MyDataset(), num_workers=0, batch_size=2, shuffle=True)
logger = ImageLogger(batch_frequency=300, log_images_kwargs={'ddim_steps': 2})
trainer = pl.Trainer(accelerator='cpu', precision=32, callbacks=[logger], max_epochs=1, enable_progress_bar=False)
trainer.fit(model, dataloader)
changed = sorted(n.split('.')[0] for n, t in model.state_dict().items() if not t.equal(before[n]))
"""

CHECKS = """
import importlib, json, runpy, sys

for script in ('canny', 'add_control', 'transfer'):
    runpy.run_path(f'{script}.py')
changed = sorted(set(runpy.run_path('train.py')['changed']))

import cldm.cldm, cldm.ddim_hacked, ldm.models.autoencoder, ldm.models.diffusion.ddim, ldm.modules.attention
import ldm.modules.encoders.modules, annotator.util
from cldm.hack import disable_verbosity, enable_sliced_attention
from cldm.model import create_model
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential, UNetModel
from ldm.modules.diffusionmodules.util import timestep_embedding, zero_module
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import instantiate_from_config, log_txt_as_img

assert not any(path == PARENT for path in sys.path)
for script in range(2):  # the second time with the parent folder on the path, too
    import ControlNet.cldm.cldm, ControlNet.annotator.util
    model = create_model('./models/cldm_tiny.yaml')
    assert cldm.cldm.ControlLDM is ControlNet.cldm.cldm.ControlLDM
    assert isinstance(model, cldm.cldm.ControlLDM) and isinstance(model, LatentDiffusion)
    assert cldm.ddim_hacked.DDIMSampler is ldm.models.diffusion.ddim.DDIMSampler
    assert annotator.util.HWC3 is ControlNet.annotator.util.HWC3
    sys.path.append(PARENT)
try:
    importlib.import_module('cldm.nothing')
except ModuleNotFoundError as error:
    assert 'cldm.nothing' in str(error)
json.dump(changed, open('changed.json', 'w'))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the scripts have run, all in one process, as each would spend its time on imports."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "models").symlink_to(MODELS_FOLDER)
    for name, script in (("canny", CANNY), ("add_control", ADD_CONTROL), ("transfer", TRANSFER), ("train", TRAIN)):
        (folder / f"{name}.py").write_text(script)
    (folder / "checks.py").write_text(f"PARENT = {str(FOLDER.parent)!r}\n" + CHECKS)
    Image.fromarray(picture()).save(folder / "input.png")
    state = load_model("tiny").state_dict()
    base = {name: tensor for name, tensor in state.items() if not name.startswith("control_model.")}
    torch.save({"state_dict": base}, folder / "base.ckpt")
    other = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in base.items()}
    torch.save(other, folder / "other.ckpt")
    done = forks.run(["checks.py"], cwd=folder, env={"PYTHONPATH": str(FOLDER)})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def picture():
    image = np.zeros((48, 50, 3), np.uint8)
    image[10:40, 20:28] = (250, 240, 230)
    image[20:26, 10:40] = (250, 240, 230)
    return image


def test_classes_exist_once(folder):
    """Asserted by checks.py."""
    assert (folder / "changed.json").exists()


def test_a_canny_script_makes_the_pictures_of_our_own_interface(folder):
    results = np.load(folder / "results.npy")
    assert results.shape == (4, 64, 64, 3)
    edges = 255 - results[0]
    assert set(np.unique(edges)) == {0, 255}
    model = load_model("tiny")
    hint = (torch.from_numpy(edges).float() / 255).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
    cond, uncond = (
        {"c_concat": [hint], "c_crossattn": [model.get_learned_conditioning([text] * 2)]}
        for text in ("digit four", "lowres")
    )
    torch.manual_seed(12)
    latents, _ = DDIMSampler(model).sample(
        5, 2, (4, 8, 8), cond, x_T=torch.randn(2, 4, 8, 8), verbose=False,
        unconditional_guidance_scale=9.0, unconditional_conditioning=uncond,
    )  # fmt: skip
    expected = (model.decode_first_stage(latents) * 127.5 + 127.5).clamp(0, 255).permute(0, 2, 3, 1).byte().numpy()
    assert np.abs(results[1:3].astype(int) - expected).max() <= 1


def test_added_control_starts_from_random_hints_and_zero_convolutions(folder):
    state = torch.load(folder / "ini.ckpt")
    base = load_model("tiny").state_dict()
    for name, tensor in state.items():
        if any(part in name for part in ("zero_convs", "middle_block_out", "input_hint_block.14")):
            assert not tensor.any(), name
        elif name.startswith("control_model.input_hint_block"):
            assert tensor.std() > 0, name
        elif name.startswith("control_model."):
            assert torch.equal(tensor, base[name.replace("control_model", "model.diffusion_model")]), name


def test_transferred_control_follows_the_base(folder):
    before, after = torch.load(folder / "ini.ckpt"), torch.load(folder / "transferred.pth")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        moved = tensor.is_floating_point() and not any(p in name for p in ("zero_convs", "hint_block", "block_out"))
        assert torch.allclose(tensor, before[name] + moved, atol=1e-5), name


def test_training_changes_the_control_network_alone_and_logs_images(folder):
    assert json.loads((folder / "changed.json").read_text()) == ["control_model"]
    images = {path.name for path in folder.glob("**/image_log/train/*.png")}
    kinds = ("reconstruction", "control", "conditioning", "samples_cfg_scale_9.00")
    assert images == {f"{kind}_gs-000001_e-000000_b-000000.png" for kind in kinds}
    for path in folder.glob("**/checkpoints/*.ckpt"):  # Lightning's own checkpoint is a file of weights, too
        assert load_model(path_with_config(path)).fingerprint != load_model("tiny").fingerprint


def path_with_config(path: Path) -> Path:
    path.with_suffix(".yaml").write_bytes((MODELS_FOLDER / "cldm_tiny.yaml").read_bytes())
    return path
