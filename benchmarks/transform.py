"""Images per second of the policy against the augmentations that people use, in one run.

    pip install -e '.[bench]' && python benchmarks/transform.py [--device cpu] [--threads 2]

Each line is the median of several rounds, with the lowest and the highest; the lines of a size take turns, so that a drift
of the machine meets all, and the ratio to timm is taken round by round. "Bytes" is what a search does to the batches of
fastai's usual loaders (before `IntToFloatTensor`); the other lines of ours start from float images and give float images.
Writes results/transform_DEVICE.json and .md.
"""
import argparse,time
import torch
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image
from common import *
from hba_fastai.pba import PBAPolicy
from hba_fastai.space import PBASpace

PEER = 'timm RandAugment, PIL, per image'

def contenders(b, s, device):
    "{name: function of no argument that augments a batch of b images of s pixels}"
    g = torch.Generator().manual_seed(0)
    few = torch.randint(0, 256, (b//8+1,3,max(s//8,1),max(s//8,1)), dtype=torch.uint8, generator=g).repeat(8,1,1,1)[:b]
    u = few.repeat_interleave(8,2).repeat_interleave(8,3)[...,:s,:s].contiguous() # blocks: between noise and photographs
    x = (u.float()/255).to(device)
    u = u.to(device)
    policy,lam = PBAPolicy().to(device),lambda at: PBASpace().start(at).expand(b,-1).to(device)
    out = {'copy of the float batch': x.clone, 'copy of the bytes': u.clone}
    for name,at in (('start λ',0.05),('λ = 0',0.5)):
        l,y = lam(at),x.clone()
        out[f'ours, bytes, {name}'] = lambda l=l: policy.apply(u, policy.draw_under(l, None))
        out[f'ours, float in place, {name}'] = lambda l=l,y=y: policy.apply(y, policy.draw_under(l, None), inplace=True)
        out[f'ours, float, {name}'] = lambda l=l: policy.apply(x, policy.draw_under(l, None))
    if device!='cpu': return out
    pil,ra = [to_pil_image(o) for o in u],v2.RandAugment(2)
    out['torchvision RandAugment(2), PIL, per image'] = lambda: [ra(o) for o in pil]
    out['torchvision RandAugment(2), tensors, per image'] = lambda: [ra(o) for o in u]
    try:
        from timm.data.auto_augment import rand_augment_transform
        t = rand_augment_transform('rand-m9-n2-mstd0.5', {})
        out[PEER] = lambda: [t(o) for o in pil]
    except ImportError: print('timm is not installed: left out')
    try:
        import kornia.augmentation.auto as ka
        k = ka.RandAugment(n=2, m=9)
        out['kornia RandAugment, one sub-policy per batch'] = lambda: k(x)
        out['kornia RandAugment, per image'] = lambda: [k(o[None]) for o in x]
    except ImportError: print('kornia is not installed: left out')
    return out

def measure(fs, b, rounds, seconds=0.4, sync=lambda: None):
    "Images per second of each function in each round, taking turns"
    out = {k: [] for k in fs}
    for r in range(rounds+1):
        for k,f in fs.items():
            n,t = 0,time.perf_counter()
            while n<2 or time.perf_counter()-t<seconds: f(); n += 1
            sync()
            if r: out[k].append(n*b/(time.perf_counter()-t))
    return out

def table(d):
    spread = lambda v,form: f"{form(np.median(v))} ({form(min(v))}, {form(max(v))})"
    names = ('images','batch','augmentation','images/s, median (lowest, highest)',
             '÷ timm, round by round','÷ copy of the float batch')
    rows = [f"| {' | '.join(names)} |", f"|{' --- |'*len(names)}"]
    for r in d['rows']:
        peer,copy = r['speed'].get(PEER),np.median(r['speed']['copy of the float batch'])
        for k,v in r['speed'].items():
            compared = peer and k!=PEER and not k.startswith('copy')
            quotient = spread(np.divide(v, peer), '{:.2f}'.format) if compared else ''
            cells = f"{r['size']}x{r['size']}",r['batch'],k,spread(v, '{:,.0f}'.format),quotient,f'{np.median(v)/copy:.4f}'
            rows.append(f"| {' | '.join(map(str, cells))} |")
    e = d['environment']
    return '\n'.join([*rows,'',footer(e, f"torchvision {e['torchvision']}", f"{d['rounds']} rounds"),''])

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--device', default='cpu')
    ap.add_argument('--threads', type=int, default=2)
    ap.add_argument('--rounds', type=int, default=5)
    ap.add_argument('--sizes', nargs='+', default=['32x128','224x64','64x128','32x32','32x512'], help='pixels x batch')
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    rows = []
    for o in a.sizes:
        s,b = map(int, o.split('x'))
        sync = torch.cuda.synchronize if a.device=='cuda' else lambda: None
        rows.append(dict(size=s, batch=b, speed=measure(contenders(b, s, a.device), b, a.rounds, sync=sync)))
        print(s, b, {k: round(float(np.median(v))) for k,v in rows[-1]['speed'].items()}, flush=True)
    d = dict(rows=rows, rounds=a.rounds, environment=environment())
    out = RESULTS/f'transform_{a.device}.json'
    save_json(out, d)
    out.with_suffix('.md').write_text(table(d))
