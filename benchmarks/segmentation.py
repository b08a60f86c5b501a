"""Does a search find that the pictures of the field are turned, where the targets are masks?

    python benchmarks/segmentation.py --seeds 1 2 3    # runs what is missing, then writes results/segmentation.md
    python benchmarks/segmentation.py --table

Pictures of 16x16 pixels with faint bars in noise: those that lie are class 1, those that stand are class 2, the rest is 0. To see one, a network must add
up pixels along it. Validation and test pictures are turned by up to 30 degrees either way, with their masks (`turned`), or are like those of training (`null`).
A place of Rotate is that among the 15 operations, 1 for the first: by dose (probability times severity, of both copies, in the last λ; those without a
magnitude count with severity 1), and by the signal of the hypergradients. The pictures and the length of the training were chosen on seed 0.
results/segmentation.jsonl: shift, seed, dose and signal of each operation, names (what `report` names), error in percent of the test pixels,
plain (the same without a search), cpu_seconds of the search.
"""
import argparse,json,time
import torch
from fastai.callback.all import ParamScheduler,ProgressCallback,SchedCos
from fastai.data.all import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from fastai.vision.augment import IntToFloatTensor
from fastai.vision.core import TensorImage,TensorMask
from torch import Tensor,nn
from common import NoValid,RESULTS,environment,made_by,mean_se,quiet
from hba_fastai.all import HBACallback,PBAPolicy
from hba_fastai.data import ArrayDL
from hba_fastai.ops import OP,OPS,OP_NAMES
from hba_fastai.places import move_masks
from hba_fastai.space import TABLE7

FILE = RESULTS/'segmentation.jsonl'
SIZE,SHIFTS,EPOCHS,LR = 16,('turned','null'),80,0.1

def pictures(n, g):
    "Bytes (n,3,16,16) and their masks"
    whole = lambda lo, hi: torch.randint(lo, hi, (n,1,1), generator=g)
    mask,line = torch.zeros(n, SIZE, SIZE, dtype=torch.uint8),torch.arange(SIZE)
    for cls in (1,2):
        long,wide = whole(7, 12),whole(1, 3)
        h,w = (wide,long) if cls==1 else (long,wide)
        y,x = (2+(whole(0, 1000)*(SIZE-4-o))//1000 for o in (h,w))
        mask[(line[:,None]>=y) & (line[:,None]<y+h) & (line>=x) & (line<x+w)] = cls
    level = 0.35+0.35*(mask>0)+0.2*torch.randn(n, SIZE, SIZE, generator=g)
    return (level.clamp(0,1)*255).byte()[:,None].repeat(1,3,1,1),mask

def turned(x, y, g):
    "Pictures and masks turned by up to 30 degrees either way"
    m = (torch.rand(len(x), generator=g)*2-1)*30
    op = torch.full((len(x),1), OP['Rotate'])
    return (OPS['Rotate'](x/255, m, fill=0.35)*255).round().byte(),move_masks(y, op, m[:,None], (SIZE,SIZE))

class Masked:
    "Pictures and masks in memory"
    n_inp = 1
    def __init__(self, x, y, split_idx): self.x,self.y,self.split_idx = x,y,split_idx
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return TensorImage(self.x[i]),TensorMask(self.y[i])

def learner(shift, seed):
    g = torch.Generator().manual_seed(seed)
    source,*field = [pictures(n, g) for n in (320,400,600)]
    parts = [source,*[turned(*o, g) if shift=='turned' else o for o in field]]
    set_seed(seed)
    kw = dict(bs=32, num_workers=0, after_batch=[IntToFloatTensor()], device='cpu')
    dls = [ArrayDL(Masked(*o, min(i,1)), shuffle=i==0, drop_last=i==0, **kw) for i,o in enumerate(parts)]
    layer = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 5, padding=2, bias=False), nn.BatchNorm2d(b), nn.ReLU())
    net = nn.Sequential(layer(3, 12), layer(12, 12), nn.Conv2d(12, 3, 5, padding=2))
    learn = Learner(DataLoaders(*dls, device='cpu'), net, loss_func=CrossEntropyLossFlat(axis=1), opt_func=SGD)
    learn.logger = quiet
    return learn.remove_cb(ProgressCallback)

def error(learn):
    "Percent of the test pixels that are named wrongly"
    learn.model.eval()
    with torch.no_grad(): wrong = [learn.model(x.as_subclass(Tensor)).argmax(1)!=y.as_subclass(Tensor) for x,y in learn.dls[2]]
    return 100*torch.cat(wrong).float().mean().item()

def trained(shift, seed, cbs=()):
    learn = learner(shift, seed)
    learn.fit(EPOCHS, LR, cbs=[ParamScheduler({'lr': SchedCos(LR, 0.)}),NoValid(),*cbs])
    return error(learn)

def doses(lam):
    "Probability times severity of each operation, both copies together"
    policy = PBAPolicy()
    d = policy.expected(lam)
    graded = iter(d[len(OP_NAMES):].abs().tolist())
    return {o: next(graded) if TABLE7[o] else p for o,p in zip(OP_NAMES, d.tolist())}

def run(shift, seed):
    "One search -> its line in the result file"
    hba,t = HBACallback(seed=seed),time.process_time()
    e = trained(shift, seed, [hba])
    t,df = time.process_time()-t,hba.report()
    short = lambda d: {o: round(v, 4) for o,v in d.items()}
    return dict(shift=shift, seed=seed, dose=short(doses(hba.lam.value)), signal=short(df.signal.to_dict()), names=list(df.index[df.named]),
                error=e, plain=trained(shift, seed), cpu_seconds=round(t, 1))

def lines(): return [json.loads(l) for l in FILE.read_text().splitlines()] if FILE.exists() else []
def runs(): return {(r['shift'],r['seed']): r for r in lines() if 'shift' in r}
def place(d): return sorted(d, key=d.get, reverse=True).index('Rotate')+1

def table():
    out = ['Segmentation of bars in noise: where Rotate stands among the 15 operations at the end of a search, 1 for the first (one number for each seed).','']
    out += ['| validation and test pictures | place by dose | place by signal | signal | named | error % | error % without a search |','|'+' --- |'*7]
    for shift in SHIFTS:
        rs = [r for k,r in sorted(runs().items()) if k[0]==shift]
        if not rs: continue
        pm = lambda k: '{:.2f} ± {:.2f}'.format(*mean_se([r[k] for r in rs]))
        of = lambda f: ', '.join(str(f(r)) for r in rs)
        places = [of(lambda r: place(r['dose'])),of(lambda r: place(r['signal']))]
        found = [of(lambda r: round(r['signal']['Rotate'], 1)),of(lambda r: '+'.join(r['names']) or '-')]
        what = dict(turned='turned by up to 30 degrees', null='like those of training')[shift]
        out.append(f"| {what} | {' | '.join(places+found)} | {pm('error')} | {pm('plain')} |")
    seconds = [r['cpu_seconds'] for r in runs().values()]
    out += ['',f"A search takes {min(seconds):.0f} to {max(seconds):.0f} CPU seconds.",'']
    out += made_by([l['environment'] for l in lines() if 'environment' in l])
    FILE.with_suffix('.md').write_text('\n'.join(out))

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--seeds', type=int, nargs='+', default=[1,2,3])
    ap.add_argument('--table', action='store_true', help='only write the table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    todo = [] if a.table else [(shift,seed) for seed in a.seeds for shift in SHIFTS if (shift,seed) not in runs()]
    if todo:
        with FILE.open('a') as f: f.write(json.dumps(dict(environment=environment()))+'\n')
    for shift,seed in todo:
        r = run(shift, seed)
        with FILE.open('a') as f: f.write(json.dumps(r)+'\n')
        print(shift, seed, place(r['dose']), place(r['signal']), r['names'], f"{r['error']:.2f} {r['plain']:.2f}", r['cpu_seconds'], flush=True)
    table()
