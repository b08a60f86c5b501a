from contextlib import contextmanager
from unittest import mock
import pytest
import torch
from fastai.callback.all import ProgressCallback
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from PIL import Image
from hba_fastai import kernels
from hba_fastai.data import digits,digits_dls
from torch import nn

torch.set_num_threads(1) # small networks, and machines that do other things too

@pytest.fixture(autouse=True)
def seeded(): set_seed(1234) # a test that draws without a seed of its own draws the same in each run

def small_net(c=3, n=10):
    return nn.Sequential(nn.Conv2d(c,8,3,2,1), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.Conv2d(8,16,3,2,1), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,n))

def quiet(row): pass

def small_learner(seed=0, dls=None, model=None, n_train=200, n_valid=100, **kwargs):
    "A Learner that trains an epoch on digits in a fraction of a second"
    set_seed(seed)
    dls = dls or digits_dls(n_train, n_valid, bs=20, size=12)
    learn = Learner(dls, model or small_net(), metrics=accuracy, **kwargs)
    learn.logger = quiet
    return learn.remove_cb(ProgressCallback)

@contextmanager
def recorded():
    "Within, the kernels are not launched: gives a list of what they would be launched with, `(name, grid, arguments)`"
    class Kernel:
        def __init__(self, name): self.name = name
        def __getitem__(self, grid): return lambda *args: launches.append((self.name,grid,args))
    launches,own = [],{name: Kernel(name) for name in ('_statistics','_operate')}
    with mock.patch.multiple(kernels, create=True, **own): yield launches # where there is no Triton, too

def write_images(path, n=40, classes='ab'):
    x,_ = digits(24)
    for i in range(n):
        f = path/classes[i%len(classes)]/f'{i}.png'
        f.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(x[i].permute(1,2,0).numpy()).save(f)
    return path

@pytest.fixture
def pngs(tmp_path): return write_images(tmp_path/'im')
