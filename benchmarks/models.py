"""The networks of the paper's experiments, each beside its small form: `MODELS[name].full(classes)`, `MODELS[name].small(classes)`.

Wide-ResNet is in common.py, ResNet-50 is torchvision's, the AlexNet of STN is the package's. Here are Shake-Shake (Gastaldi, arXiv 1705.07485)
and PyramidNet (Han et al., arXiv 1610.02915) with ShakeDrop (Yamada et al., arXiv 1802.02375).
"""
from functools import partial
from typing import NamedTuple
import torch
from torch import nn
import torch.nn.functional as F
from common import Bfloat16,wrn
from hba_fastai.stn import stn_alexnet
from torchvision.models import resnet18,resnet50

class Mixed(torch.autograd.Function):
    "Forward `a`·x, backward `b`·g, with numbers for each image"
    @staticmethod
    def forward(ctx, x, a, b):
        ctx.save_for_backward(b)
        return a*x
    @staticmethod
    def backward(ctx, g): return ctx.saved_tensors[0]*g,None,None

def per_image(x): return x.new_empty(len(x),1,1,1).uniform_()

def started(m):
    "`m` with convolutions initialised as for ReLU, and no bias in the classifier"
    for l in m.modules():
        if isinstance(l, nn.Conv2d): nn.init.kaiming_normal_(l.weight, mode='fan_out', nonlinearity='relu')
        if isinstance(l, nn.Linear): nn.init.zeros_(l.bias)
    return m

def conv3(a, b, stride=1): return nn.Conv2d(a, b, 3, stride, 1, bias=False)
def conv1(a, b): return nn.Conv2d(a, b, 1, bias=False)
def head(width, c): return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, c)]

# --- Shake-Shake 26 2xWd

class Halves(nn.Module):
    "The shortcut where the number of channels changes: the image at a stride, and moved by a pixel, each into half of the channels"
    def __init__(self, a, b, stride):
        super().__init__()
        self.stride = stride
        self.left,self.right,self.bn = conv1(a, b//2),conv1(a, b//2),nn.BatchNorm2d(b)
    def forward(self, x):
        s = self.stride
        x = F.relu(x)
        moved = F.pad(x, (0,1,0,1))[...,1:,1:]
        return self.bn(torch.cat([self.left(x[...,::s,::s]),self.right(moved[...,::s,::s])], 1))

class ShakeBlock(nn.Module):
    "Two branches, mixed at random for each image, by other numbers forward and backward"
    def __init__(self, a, b, stride):
        super().__init__()
        branch = lambda: nn.Sequential(nn.ReLU(), conv3(a, b, stride), nn.BatchNorm2d(b), nn.ReLU(), conv3(b, b), nn.BatchNorm2d(b))
        self.one,self.two = branch(),branch()
        self.short = Halves(a, b, stride) if a!=b else nn.Identity()
    def forward(self, x):
        one,two = self.one(x),self.two(x)
        if not self.training: return self.short(x) + (one+two)/2
        a,b = per_image(x),per_image(x)
        return self.short(x) + Mixed.apply(one, a, b) + Mixed.apply(two, 1-a, 1-b)

def shake_shake(width, c=10, n=4):
    "Shake-Shake 26 2x`width`d"
    ws = [16,width,2*width,4*width]
    blocks = [ShakeBlock(ws[i] if j==0 else ws[i+1], ws[i+1], 2 if i and j==0 else 1) for i in range(3) for j in range(n)]
    return started(nn.Sequential(conv3(3,16), nn.BatchNorm2d(16), *blocks, nn.ReLU(), *head(ws[3], c)))

# --- PyramidNet of bottlenecks, with ShakeDrop

class PyramidBlock(nn.Module):
    """A bottleneck whose output is kept with probability `keep`, and is else multiplied by U[-1,1] forward and U[0,1] backward.
    The numbers are drawn for each image; what the shortcut lacks in channels is zero"""
    def __init__(self, a, width, stride, keep):
        super().__init__()
        self.keep,self.stride,self.more = keep,stride,4*width-a
        self.body = nn.Sequential(nn.BatchNorm2d(a), conv1(a, width), nn.BatchNorm2d(width), nn.ReLU(), conv3(width, width, stride),
                                  nn.BatchNorm2d(width), nn.ReLU(), conv1(width, 4*width), nn.BatchNorm2d(4*width))
    def forward(self, x):
        y = self.body(x)
        if self.training:
            kept = (per_image(x)<self.keep).to(x.dtype)
            y = Mixed.apply(y, kept + (1-kept)*(2*per_image(x)-1), kept + (1-kept)*per_image(x))
        else: y = self.keep*y
        short = F.avg_pool2d(x, 2) if self.stride==2 else x
        return y + F.pad(short, (0,0,0,0,0,self.more))

def pyramid(depth, alpha, c=10):
    "PyramidNet + ShakeDrop: width grows by `alpha` in all, the last block is kept with probability ½"
    n = (depth-2)//9
    widths = [round(16+alpha*(i+1)/(3*n)) for i in range(3*n)]
    ins = [16,*[4*w for w in widths[:-1]]]
    blocks = [PyramidBlock(a, w, 2 if i in (n,2*n) else 1, 1-0.5*(i+1)/(3*n)) for i,(a,w) in enumerate(zip(ins, widths))]
    out = 4*widths[-1]
    return started(nn.Sequential(conv3(3,16), nn.BatchNorm2d(16), *blocks, nn.BatchNorm2d(out), nn.ReLU(), *head(out, c)))

# --- by name

class Model(NamedTuple):
    "A network in the paper's form and in the small form: functions of the number of classes"
    full:object
    small:object

def half(f): return lambda c: Bfloat16(f(c=c))

MODELS = {
    'WRN-40-2':  Model(partial(wrn, 40, 2),  half(partial(wrn, 10, 1))),
    'WRN-28-10': Model(partial(wrn, 28, 10), half(partial(wrn, 16, 1))),
    'Shake-Shake (26 2x32d)':  Model(partial(shake_shake, 32),  half(partial(shake_shake, 8, n=1))),
    'Shake-Shake (26 2x96d)':  Model(partial(shake_shake, 96),  half(partial(shake_shake, 12, n=1))),
    'Shake-Shake (26 2x112d)': Model(partial(shake_shake, 112), half(partial(shake_shake, 14, n=1))),
    'PyramidNet+ShakeDrop':    Model(partial(pyramid, 272, 200), half(partial(pyramid, 29, 16))),
    'ResNet-50': Model(lambda c: resnet50(num_classes=c), lambda c: Bfloat16(resnet18(num_classes=c))),
    'AlexNet':   Model(stn_alexnet, lambda c: stn_alexnet(c, width=0.25))}
