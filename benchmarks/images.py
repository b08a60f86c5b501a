"""The images of the paper's experiments and what acts on them behind the policy: `loaders(setting, where, scale, seed)`.

`--data` is the folder that holds torchvision's CIFAR-10, CIFAR-100 or SVHN, or `train` and `val` of ImageNet with a folder for each class.
Two words stand for no folder: `jpeg` is the archive of CIFAR-10 as JPEG of common.py, and `fake` is noise, to see that a row works.
"""
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
import numpy as np
import torch
from PIL import Image
from torchvision import datasets
from fastai.data.block import CategoryBlock,DataBlock
from fastai.data.transforms import GrandparentSplitter,get_image_files,parent_label
from fastai.vision.augment import Normalize,RandomResizedCrop,RandTransform
from fastai.vision.core import TensorImage
from fastai.vision.data import ImageBlock
from common import CutoutTfm,FlipCrop,cifar,small
from hba_fastai.data import array_dls
from hba_fastai.ops import apply_ops
from hba_fastai.pixels import OP

SIZE = {'full': 32, 'small': 16, 'steps': 32} # pixels; of ImageNet itself:
IMAGENET_SIZE = {'full': 224, 'small': 64, 'steps': 64}
CLASSES = {'CIFAR-10': 10, 'CIFAR-100': 100, 'SVHN': 10, 'ImageNet-120': 120, 'ImageNet': 1000}

class Where(NamedTuple):
    "Where the images are"
    folder:str     # A folder, 'jpeg' or 'fake'
    download:bool=False # May torchvision fetch them?

    def name(self, data:str) -> str:
        "What the results call them"
        return {'jpeg': 'CIFAR-10 as JPEG', 'fake': 'fake'}.get(self.folder, data)

# --- reading: {'train': (x (N,3,h,w) uint8, y (N,)), 'test': the same}

def tensors(x, y): return torch.as_tensor(np.ascontiguousarray(x)),torch.as_tensor(y).long()

def fake(data, n=64):
    g = torch.Generator().manual_seed(0)
    sets = lambda: (torch.randint(0, 256, (n,3,32,32), generator=g).byte(),torch.arange(n)%CLASSES[data])
    return dict(train=sets(), test=sets())

def cifar_of(kind, where):
    part = lambda train: kind(where.folder, train=train, download=where.download)
    return {k: tensors(d.data.transpose(0,3,1,2), d.targets) for k,d in (('train',part(True)),('test',part(False)))}

def svhn(where):
    "The core training set and the additional images, one behind the other"
    part = lambda split: datasets.SVHN(where.folder, split=split, download=where.download)
    parts = {k: part(k) for k in ('train','extra','test')}
    both = [np.concatenate([getattr(parts[k], o) for k in ('train','extra')]) for o in ('data','labels')]
    return dict(train=tensors(*both), test=tensors(parts['test'].data, parts['test'].labels))

def svhn_core(where):
    "The core training set alone, of which the reduced one is a part"
    part = lambda split: datasets.SVHN(where.folder, split=split, download=where.download)
    return {k: tensors(part(k).data, part(k).labels) for k in ('train','test')}

def imagenet_120(where, n_train=16_000, size=32):
    "120 classes of ImageNet at 32 pixels, at random: `n_train` training images, and their validation images as test images"
    g,out = np.random.default_rng(0),{}
    names = sorted(f.name for f in (Path(where.folder)/'train').iterdir())
    if len(names)<120: sys.exit(f"{where.folder}/train has {len(names)} folders of classes and 120 are needed: give the folder of ImageNet")
    names = sorted(g.permutation(names)[:120])
    for part,folder in (('train','train'),('test','val')):
        files = [f for n in names for f in sorted((Path(where.folder)/folder/n).iterdir())]
        files = [files[i] for i in g.permutation(len(files))[:n_train]]
        x = [np.array(Image.open(f).convert('RGB').resize((size,size), Image.Resampling.BOX)) for f in files]
        out[part] = tensors(np.stack(x).transpose(0,3,1,2), [names.index(f.parent.name) for f in files])
    return out

READERS = {'CIFAR-10': lambda w: cifar_of(datasets.CIFAR10, w), 'CIFAR-100': lambda w: cifar_of(datasets.CIFAR100, w), 'SVHN': svhn,
           'SVHN-core': svhn_core, 'ImageNet-120': imagenet_120}

@lru_cache(2)
def read(data, where):
    "The images of `data`, or an end with one sentence"
    if where.folder=='fake': return fake(data.removesuffix('-core'))
    if where.folder=='jpeg':
        if data!='CIFAR-10': sys.exit(f"The JPEG archive stands in for CIFAR-10, and this row needs {data}: give its folder, `--data FOLDER`")
        return cifar()
    has_folder(data, where)
    try: return READERS[data](where)
    except (RuntimeError,FileNotFoundError) as e:
        sys.exit(f"{data} is not in {where.folder} ({str(e).splitlines()[0]}): give the folder that holds it, or add --download")

def has_folder(data, where):
    if data.startswith('ImageNet'):
        missing = [o for o in ('train','val') if not (Path(where.folder)/o).is_dir()]
        if missing: sys.exit(f"{data} is not in {where.folder}, where there is no folder `{missing[0]}`: give the folder that holds `train` and `val`")
    elif not where.download and not Path(where.folder).is_dir():
        sys.exit(f"{where.folder} is no folder: give the one that holds {data}, or add --download")

# --- splits

def split(d, s, seed) -> list: # [(x, y)]: to train, for the hyper-steps if there are any, to judge by
    "The images of a setting: training images at random, and the test images or the last fifth of the training images"
    (x,y),n = d['train'],s.n_train or len(d['train'][0])
    i = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    if n+s.n_valid>len(x): sys.exit(f"{s.data} has {len(x)} training images here and this row needs {n+s.n_valid}: give the whole data set")
    parts = [i[:n],*([i[n:n+s.n_valid]] if s.n_valid else [])]
    last = i[len(i)-len(i)//5:] # 10,000 of the 50,000 of CIFAR
    return [*((x[p],y[p]) for p in parts),d['test'] if s.held=='test' else (x[last],y[last])]

# --- what acts behind the policy (Section 4.2)

class Jitter(RandTransform):
    "Brightness, contrast and colour of each image times U[0.6,1.4]"
    order,split_idx = 20,0
    def __init__(self): super().__init__(p=1.)
    def encodes(self, x:TensorImage):
        v = x.as_subclass(torch.Tensor)
        op = torch.tensor([OP[o] for o in ('Brightness','Contrast','Color')], device=v.device).expand(len(v), -1)
        m = 0.6 + 0.8*torch.rand(len(v), 3, device=v.device)
        return TensorImage(apply_ops(v, op, m, m.new_zeros(len(v),3,2)))

class Lighting(RandTransform):
    "PCA jittering as AlexNet's: noise along the principal components of ImageNet's colours"
    order,split_idx = 21,0
    values = torch.tensor([0.2175,0.0188,0.0045])
    vectors = torch.tensor([[-0.5675,0.7192,0.4009],[-0.5808,-0.0045,-0.8140],[-0.5836,-0.6948,0.4203]])
    def __init__(self, sd=0.1): super().__init__(p=1.); self.sd = sd
    def encodes(self, x:TensorImage):
        shift = (self.sd*torch.randn(len(x), 3)*self.values)@self.vectors.T
        return x + shift.to(x.device, x.dtype)[:,:,None,None]

def transforms(s, mean, std, size) -> list:
    "The baseline augmentation of a data set, and Cutout"
    normalize = Normalize.from_stats(mean, std)
    if s.model=='AlexNet': return [normalize] # STN's policy has its own
    if s.data.startswith('SVHN'): return [normalize, CutoutTfm(20/32)]
    if s.data=='ImageNet': return [Jitter(), Lighting(), normalize, FlipCrop(0)]
    if s.data=='ImageNet-120': return [Jitter(), Lighting(), normalize, FlipCrop(size//8)] # the paper does not say how 32 pixels are cropped
    return [normalize, FlipCrop(size//8), CutoutTfm(16/32)]

# --- `DataLoaders`

def loaders(s, where, scale, seed, device=None):
    "`DataLoaders` of a setting: training images, those of the hyper-steps if there are any, those that it is judged by"
    if s.data=='ImageNet' and where.folder!='fake': return imagenet(s, where, scale, seed, device)
    size = IMAGENET_SIZE[scale] if s.data=='ImageNet' else 32 if s.model=='AlexNet' else SIZE[scale] # STN's network needs 32
    core = s.data=='SVHN' and s.n_train and where.folder!='fake' # reduced SVHN, searched or trained on, is a part of the core
    sets = [(small(x, size) if x.shape[-1]!=size else x,y) for x,y in split(read('SVHN-core' if core else s.data, where), s, seed)]
    level = sets[0][0][:50_000].float()/255
    mean,std = level.mean((0,2,3)).tolist(),level.std((0,2,3)).tolist()
    return array_dls(*sets, vocab=[str(i) for i in range(CLASSES[s.data])], bs=s.bs, batch_tfms=transforms(s, mean, std, size), device=device)

def imagenet(s, where, scale, seed, device):
    "ImageNet from files: cropped and resized first, so that the policy acts on a batch; then the rest of the baseline"
    has_folder('ImageNet', where)
    def some(folder):
        files = get_image_files(folder)
        train = [f for f in files if f.parent.parent.name=='train']
        keep = np.random.default_rng(seed).permutation(len(train))[:s.n_train]
        return [train[i] for i in keep] + [f for f in files if f.parent.parent.name=='val']
    mean,std = [0.485,0.456,0.406],[0.229,0.224,0.225]
    block = DataBlock((ImageBlock,CategoryBlock(sorted(f.name for f in (Path(where.folder)/'train').iterdir()))), get_items=some, get_y=parent_label,
        splitter=GrandparentSplitter('train','val'), item_tfms=RandomResizedCrop(IMAGENET_SIZE[scale], min_scale=0.08),
        batch_tfms=transforms(s, mean, std, IMAGENET_SIZE[scale]))
    return block.dataloaders(where.folder, bs=s.bs, device=device, num_workers=0 if scale=='steps' else None)
