"""What the comparison with Self-Tuning Networks (Table 6) needs: their AlexNet, their 15 hyperparameters as a policy, their rule for the learning rate.

MacKay et al., ICLR 2019, and their code (asteroidhouse/self-tuning-networks, cnn/): 8 rates of dropout, and 7 numbers of augmentation.
Two of its accidents are left out: the start of `cutlength` (4, but in fact 3.84), and hyperparameters dealt to images by a counter of calls.
"""
import json
import torch
from torch import nn
from fastai.callback.core import Callback,CancelFitException
from fastai.vision.augment import hsv2rgb,rgb2hsv
from hba_fastai.ops import apply_ops
from hba_fastai.pixels import OP
from hba_fastai.policy import Policy
from hba_fastai.space import Space

class Dropout(nn.Module):
    "Drops channels of maps, numbers of vectors, at a `rate` (B,) of each image, which the policy sets for each training batch"
    rate = None
    def forward(self, x):
        if not self.training or self.rate is None: return x
        rate = self.rate.view(-1, *[1]*(x.dim()-1)).to(x)
        return x*(torch.rand(x.shape[:2], device=x.device).view(*x.shape[:2], *[1]*(x.dim()-2)) >= rate)/(1-rate)

class AlexNet(nn.Sequential):
    "STN's AlexNet for 32 pixels: five convolutions, three linear layers, `Dropout` behind all but the last"
    def __init__(self, c=10, fc=4096):
        def conv(a, b, stride=1, pool=False):
            return [nn.Conv2d(a, b, 3, stride, 1), nn.ReLU(), *([nn.MaxPool2d(2)] if pool else []), Dropout()]
        super().__init__(*conv(3,64,2,True), *conv(64,192,pool=True), *conv(192,384), *conv(384,256), *conv(256,256,pool=True), nn.Flatten(),
                         nn.Linear(1024,fc), nn.ReLU(), Dropout(), nn.Linear(fc,fc), nn.ReLU(), Dropout(), nn.Linear(fc,c))

RATES = [*(f'dropout{i}' for i in range(5)),'fcdropout0','fcdropout1']
JITTER = 'Brightness','Contrast','Color'

class STNPolicy(Policy):
    "STN's hyperparameters: jitter, Cutout, dropout and scale of the input, and the rates of the network's `Dropout` layers"
    space = Space({o: (0,0.9,0.05/0.9) for o in RATES}, hue=(0,0.5,0.1), Brightness=(0,1,0.05), Contrast=(0,1,0.05), Color=(0,1,0.05),
                  indropout=(0,1,0.05), inscale=(0,0.3,0.05/0.3), cutlength=(0,24,1/6), cutholes=(0,4,0.25))
    def __init__(self, dropouts=(), mean=(0.5,0.5,0.5)): # The `Dropout`s of the network, mean colour of the images
        super().__init__()
        self.dropouts = tuple(dropouts)
        self.register_buffer('mean', torch.tensor(mean))

    def bind(self, data):
        new = super().bind(data)
        new.dropouts = self.dropouts # those of the network, not copies
        return new

    def draw(self, v, generator):
        n,like = len(v.hue),v.hue
        rand = lambda *shape: torch.rand(n, *shape, generator=generator, device=like.device, dtype=like.dtype)
        sizes = {o: getattr(v, o)*(2*rand()-1) for o in ('hue',*JITTER)} # uniform within ± the value, as `ColorJitter` draws
        low = 1/(1+v.inscale)
        sizes['inscale'] = low + (1+v.inscale-low)*rand()
        kept = {o: getattr(v, o) for o in (*RATES,'indropout','cutlength','cutholes')}
        return dict(**sizes, **kept, centre=rand(4,2))

    def dose(self, d):
        change = lambda o: d[o]-1 if o=='inscale' else d[o]
        return torch.stack([change(o).abs() for o in self.space.names], 1)

    def apply(self, x, d, generator=None):
        for layer,name in zip(self.dropouts, RATES): layer.rate = d[name]
        mean = self.mean.to(x)[:,None,None]
        x = self.cut(self.jitter(x, d), d, mean)
        rate,scale = (d[o].to(x)[:,None,None,None] for o in ('indropout','inscale'))
        mask = (torch.rand(x.shape, generator=generator, device=x.device)>=rate)/(1-rate).clamp(min=1e-3)
        return mean + (x-mean)*mask*scale

    def jitter(self, x, d):
        op = torch.tensor([OP[o] for o in JITTER], device=x.device).expand(len(x), -1)
        m = torch.stack([1+d[o] for o in JITTER], 1).to(x)
        x = apply_ops(x, op, m, m.new_zeros(*m.shape,2))
        hsv = rgb2hsv(x)
        return hsv2rgb(torch.cat([(hsv[:,:1]+d['hue'].to(x)[:,None,None,None])%1, hsv[:,1:]], 1))

    def cut(self, x, d, mean):
        "`cutholes` squares of `cutlength` pixels, both rounded down, in the mean colour"
        h,w = x.shape[2:]
        half,n = (d['cutlength'].floor()/2).to(x)[:,None,None],d['cutholes'].floor().to(x)
        inside = lambda size,at: (torch.arange(size, device=x.device)+0.5-at.to(x)[...,None]*size).abs()<=half
        rows,cols = inside(h, d['centre'][...,1]),inside(w, d['centre'][...,0]) # (B,4,size)
        there = (torch.arange(4, device=x.device)<n[:,None])[...,None,None] & (half[...,None]>0)
        return torch.where((there & rows[...,None] & cols[...,None,:]).any(1)[:,None], mean, x)

class STNRule(Callback):
    """STN's learning rate: a tenth after each epoch whose validation loss is above the lowest of all but the last 60; the fit ends below 1e-5,
    or 75 epochs after the lowest. The losses are kept in a file, for a fit that goes on"""
    order = 14 # before the search writes its checkpoint
    def __init__(self, file): self.file = file
    def before_fit(self): self.losses = json.loads(self.file.read_text()) if self.file.exists() else []
    def lr(self): return self.opt.hypers[-1]['lr']
    def before_epoch(self):
        late = self.losses and len(self.losses)-1-self.losses.index(min(self.losses))>=75
        if late or self.lr()<1e-5: raise CancelFitException
    def after_validate(self):
        del self.losses[self.epoch:] # what was done behind the checkpoint is done again
        self.losses.append(float(self.recorder.loss.value))
        if len(self.losses)>60 and self.losses[-1]>min(self.losses[:-60]): self.opt.set_hypers(lr=self.lr()*0.1)
        self.file.write_text(json.dumps(self.losses))
