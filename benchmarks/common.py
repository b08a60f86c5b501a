"What the benchmarks share: CIFAR-10 as JPEG in memory, Wide-ResNet, baseline augmentation, result files"
import datetime,io,json,os,platform,sys,tarfile,time
from pathlib import Path
import numpy as np, torch
from PIL import Image
from fastai.callback.core import Callback,CancelValidException
from fastai.vision.augment import Normalize,RandTransform
from fastai.vision.core import TensorImage
from torch import nn
import torch.nn.functional as F
from hba_fastai.data import array_dls
from hba_fastai.pixels import hole_lines
from hba_fastai.search import HBACallback

HERE = Path(__file__).resolve().parent

def _cpu(): # jiffies of all processors: all, and those that other machines on the host took
    stat = Path('/proc/stat')
    if not stat.exists(): return 0,0
    v = [int(o) for o in stat.read_text().splitlines()[0].split()[1:9]]
    return sum(v),v[7]

BEGAN = _cpu()

RESULTS = HERE/'results'
SHARED = HERE.parents[1]/'shared'
CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()

def cifar(root=SHARED/'data'/'cifar10_jpeg.tar.xz', cache=Path(os.environ.get('HBA_CACHE', Path.home()/'.cache'/'hba-fastai'))):
    "CIFAR-10 JPEG: {'train': (x (50000,3,32,32) uint8, y), 'test': ...}, decoded once"
    f = cache/'cifar10_jpeg.pt'
    if not f.exists():
        if not root.exists(): sys.exit(f"{root} is missing: this benchmark needs the CIFAR-10 JPEG archive, and was not run")
        out = {'train': ([],[]), 'test': ([],[])}
        with tarfile.open(root) as t:
            for m in t:
                if not m.name.endswith('.jpg'): continue
                part,cls,_ = m.name.split('/')[-3:]
                out[part][0].append(np.array(Image.open(io.BytesIO(t.extractfile(m).read())).convert('RGB')))
                out[part][1].append(cls)
        names = sorted(set(out['train'][1]))
        cache.mkdir(parents=True, exist_ok=True)
        torch.save({k: (torch.tensor(np.stack(x)).permute(0,3,1,2).contiguous(), torch.tensor([names.index(c) for c in y])) for k,(x,y) in out.items()}, f)
    return torch.load(f, weights_only=True)

def reduced_cifar(seed=0, n_train=4000, n_valid=10_000):
    "Training, validation and test images: `n_train` and `n_valid` of the 50,000 at random, and the 10,000 test images"
    d = cifar()
    (x,y),i = d['train'],torch.randperm(50_000, generator=torch.Generator().manual_seed(seed))
    a,b = i[:n_train],i[n_train:n_train+n_valid]
    return (x[a],y[a]),(x[b],y[b]),d['test']

def small(x, size):
    "Bytes at `size` pixels"
    return F.interpolate(x.float(), size, mode='area').round().byte()

# --- Wide-ResNet (Zagoruyko & Komodakis), pre-activation, 1x1 shortcuts

class Block(nn.Module):
    def __init__(self, a, b, stride):
        super().__init__()
        self.bn1,self.conv1 = nn.BatchNorm2d(a),nn.Conv2d(a,b,3,stride,1,bias=False)
        self.bn2,self.conv2 = nn.BatchNorm2d(b),nn.Conv2d(b,b,3,1,1,bias=False)
        self.short = nn.Conv2d(a,b,1,stride,bias=False) if a!=b or stride!=1 else None
    def forward(self, x):
        h = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(h))))
        return y + (x if self.short is None else self.short(h))

def wrn(depth=16, width=1, c=10):
    n,ws = (depth-4)//6,[16,16*width,32*width,64*width]
    blocks = [Block(ws[i] if j==0 else ws[i+1], ws[i+1], (1,2,2)[i] if j==0 else 1) for i in range(3) for j in range(n)]
    m = nn.Sequential(nn.Conv2d(3,16,3,1,1,bias=False), *blocks, nn.BatchNorm2d(ws[3]), nn.ReLU(inplace=True),
                      nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(ws[3],c))
    for l in m.modules():
        if isinstance(l, nn.Conv2d): nn.init.kaiming_normal_(l.weight, mode='fan_out', nonlinearity='relu')
        if isinstance(l, nn.Linear): nn.init.zeros_(l.bias)
    return m

class Bfloat16(nn.Sequential):
    "A network under autocast to bfloat16, channels last: twice as fast on processors with AMX"
    def __init__(self, net): super().__init__(net.to(memory_format=torch.channels_last))
    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16): return super().forward(x.contiguous(memory_format=torch.channels_last)).float()

# --- the baseline augmentation of the paper: policy, then flip and crop, Normalize, then Cutout of half the image

class FlipCrop(RandTransform):
    "Each image flipped with probability ½ and shifted by up to `pad` pixels, zeros (the mean) outside; after Normalize"
    order,split_idx = 100,0
    def __init__(self, pad=4, flip=True): super().__init__(p=1.); self.pad,self.flip = pad,flip
    def encodes(self, x:TensorImage):
        v,n,pad = x.as_subclass(torch.Tensor),len(x),self.pad
        h,w = v.shape[2:]
        dy,dx = torch.randint(0, 2*pad+1, (2,n,1,1), device=v.device)
        ix = torch.arange(w, device=v.device).expand(n,h,w)
        ix = torch.where(torch.rand(n,1,1, device=v.device)<0.5*self.flip, w-1-ix, ix) + dx
        iy = torch.arange(h, device=v.device)[:,None].expand(n,h,w) + dy
        i = (iy*(w+2*pad)+ix).flatten(1)[:,None].expand(-1,v.shape[1],-1)
        return F.pad(v, (pad,)*4).flatten(2).gather(2, i).view_as(v)

class CutoutTfm(RandTransform):
    "A square of half the image at a uniform centre becomes 0 (the mean); last"
    order,split_idx = 101,0
    def __init__(self, size=0.5): super().__init__(p=1.); self.size = size
    def encodes(self, x:TensorImage):
        v = x.as_subclass(torch.Tensor)
        row,col = hole_lines(torch.full((len(v),), self.size, device=v.device), torch.rand(len(v),2, device=v.device), *v.shape[2:])
        return v.masked_fill((row[:,None,:,None] & col[:,None,None,:]).bool(), 0.)

MEAN,STD = (0.4914,0.4822,0.4465),(0.2470,0.2435,0.2616)

def cifar_dls(sets, bs=128, cutout=True, extra=(), device=None):
    "`DataLoaders` with flip, crop, Normalize and Cutout; `sets` are the training, validation and test images"
    tfms = [Normalize.from_stats(MEAN, STD), FlipCrop(), *([CutoutTfm()] if cutout else []), *extra]
    return array_dls(*sets, vocab=CLASSES, bs=bs, batch_tfms=tfms, device=device)

# --- a look into a fit: probes have `begin` and `end`, which are called around a part of it

# without a GPU CPU seconds: another machine on the same host takes nothing from them
clock = time.perf_counter if torch.cuda.is_available() else time.process_time

class Seconds:
    "How long each part took"
    def __init__(self, sync): self.sync,self.took = sync,[]
    def begin(self): self.sync(); self.t = clock()
    def end(self): self.sync(); self.took.append(clock()-self.t)

class Mark(RandTransform):
    "Calls `f` for each training batch, at its place among the batch transforms"
    split_idx = 0
    def __init__(self, f, order): super().__init__(p=1.); self.f,self.order = f,order
    def before_call(self, b, split_idx):
        if len(b[0])>2: self.f() # a search looks at two items before it begins

def around_policy(probe):
    "Batch transforms around a policy that acts on bytes"
    return [Mark(probe.begin, 8.5),Mark(probe.end, 9.5)]

def around_step(probe):
    "Callbacks around forward, backward and optimizer of each training batch"
    begin,end = Callback(before_batch=lambda self: probe.begin()),Callback(after_batch=lambda self: probe.end())
    begin.order,end.order = 1000,-1000 # behind all others, before all others
    return [begin,end]

class Watched(HBACallback):
    "A search with a probe around each hyper-step"
    def __init__(self, probe, *args, **kwargs):
        super().__init__(*args, seed=0, warmup=0., **kwargs)
        self.probe = probe
    def hyper_step(self):
        self.probe.begin()
        super().hyper_step()
        self.probe.end()

# --- results

def quiet(row): pass

class NoValid(Callback):
    "No validation after each epoch: it costs as much as the training of 4,000 images and would hide the ratio of the times"
    def before_validate(self): raise CancelValidException

def error_on(learn, dl):
    "Error in percent of the model on `dl`"
    model,wrong,n = learn.model.eval(),0,0
    with torch.no_grad():
        for xb,yb in dl:
            wrong += (model(xb.as_subclass(torch.Tensor)).argmax(1)!=yb.as_subclass(torch.Tensor)).sum().item(); n += len(yb)
    return 100*wrong/n

def environment():
    "Command, versions, machine and date, for a result file; `stolen` is the share of processor time that other machines on the same host took since the start"
    import fastai,torchvision,hba_fastai
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((l.split(':')[1].strip() for l in lines if 'model name' in l), platform.processor())
    return dict(command=' '.join(['python',*sys.argv]), date=datetime.date.today().isoformat(),
                python=platform.python_version(), torch=torch.__version__, fastai=fastai.__version__,
                torchvision=torchvision.__version__, hba_fastai=hba_fastai.__version__,
                machine=f'{cpu}, {os.cpu_count()} cores', threads=torch.get_num_threads(),
                stolen=round((_cpu()[1]-BEGAN[1])/max(_cpu()[0]-BEGAN[0], 1), 3), gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)

def made_by(environments) -> list:
    "The last lines of a table: each command that had a part in it, with its date"
    commands = {(e['command'],e['date'],e['torch'],e['machine']): None for e in environments} # in order, each once
    return [*[f"`{command}`, {date}, torch {torch}, {machine}, one thread.  " for command,date,torch,machine in commands],'']

def footer(e, *more):
    "The last line of a table of times, from `environment()`"
    return ', '.join([f"`{e['command']}`", e['date'], f"torch {e['torch']}", e['gpu'] or e['machine'], f"{e['threads']} thread(s)",
                      f"{e['stolen']:.0%} of the processor time taken by other machines on the host", *more])+'.'

def save_json(path, d):
    "Write atomically, so that a run that is cut off leaves the old file or the new one"
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix('.tmp')
    tmp.write_text(json.dumps(d, indent=1))
    os.replace(tmp, path)

def mean_se(v):
    "Mean and standard error"
    v = np.array(v, dtype=float)
    return v.mean(), v.std(ddof=1)/len(v)**0.5 if len(v)>1 else float('nan')
