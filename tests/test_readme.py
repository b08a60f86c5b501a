"Every Python block of the README runs as it stands there, but for fewer epochs, images and folds, and a smaller network"
import re
from pathlib import Path
import pytest,torch
from conftest import quiet,small_net
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastcore.basics import defaults
from hba_fastai.all import Policy,Schedule,Space
from hba_fastai.data import digits
from PIL import Image

BLOCKS = re.findall(r'^```python\n(.*?)^```', (Path(__file__).parent.parent/'README.md').read_text('utf8'), re.M|re.S)

class Noise(Policy):
    "The reader's own policy"
    space,checked = Space(noise=(0,0.2)),True
    def draw(self, v, generator): return v.noise*torch.rand(len(v), generator=generator)
    def dose(self, drawn): return drawn[:,None]
    def apply(self, x, drawn, generator): return x + drawn[:,None,None,None]*torch.randn(x.shape, generator=generator)

def write_images(folder, images, labels):
    for i,(x,y) in enumerate(zip(images, labels)):
        f = folder/str(int(y)%2)/f'{i}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.permute(1,2,0).numpy()).save(f)

SHORTER = (r'((?:fit|fit_one_cycle|fine_tune)\()\d+', r'\g<1>3'),(r'bs=\d+', 'bs=32'),(r'Resize\(\d+\)', 'Resize(16)'),(r'k=\d+', 'k=2')

def shorter(block):
    for long,short in SHORTER: block = re.sub(long, short, block)
    return block

def small(dls, arch, **kwargs):
    "As `vision_learner`"
    learn = Learner(dls, small_net(n=2), **kwargs).remove_cb(ProgressCallback)
    learn.logger = quiet
    return learn

@pytest.mark.filterwarnings('ignore') # the trainings are too short for anything
def test_the_python_blocks_run(tmp_path, monkeypatch):
    x,y = digits(16)
    write_images(tmp_path/'lab', x[:100], y[:100])
    write_images(tmp_path/'field', x[100:130], y[100:130])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('fastai.vision.all.vision_learner', small)
    monkeypatch.setattr(defaults, 'cpus', 0) # no worker processes
    names = dict(path=tmp_path/'lab', Noise=Noise)
    assert len(BLOCKS)>=4
    for block in BLOCKS: exec(shorter(block), names)
    assert len(Schedule.load('schedule.json'))==7 # the start, where λ begins to move and where it ends, four ends of epochs
