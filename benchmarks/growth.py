"""How the cost grows: the transform with batch, image size and H; a hyper-step with the number of hyper-layers; a search with
the number of hyper-steps.

    python benchmarks/growth.py [--device cpu] [--threads 1]

Ratios to the first entry of each row, all measured in turns in one run; hyper-steps in CPU seconds on a CPU.
Writes results/growth_DEVICE.json and .md.
"""
import argparse
import torch
from common import *
from surcharge import learner,seconds
from transform import measure
from hba_fastai.search import HBACallback
from hba_fastai.pba import PBAPolicy
from hba_fastai.space import PBASpace

def policy_of(n):
    "The policy with so many copies of each operation"
    class Copies(PBAPolicy): copies = n
    return Copies()

def one(b, size, copies, device):
    "Function that augments a batch of bytes under a space with so many copies of each operation"
    policy = policy_of(copies).to(device)
    u,lam = torch.randint(0, 256, (b,3,size,size), dtype=torch.uint8),policy.space.start(0.1/copies).expand(b,-1)
    u,lam = u.to(device),lam.to(device)
    return lambda: policy.apply(u, policy.draw_under(lam, None))

def transform_rows(device, rounds, sync):
    out = {}
    for what,cases in {'batch (32 pixels)': {b: one(b, 32, 2, device) for b in (32,128,512)},
                       'pixels (batch 64)': {s: one(64, s, 2, device) for s in (32,64,128,224)},
                       'H (batch 128, 32 pixels)': {len(PBASpace(c)): one(128, 32, c, device) for c in (1,2,4,8)}}.items():
        speed = {k: float(np.median(v)) for k,v in measure(cases, 1, rounds, 0.2, sync).items()} # batches per second
        first = next(iter(speed.values()))
        out[f'transform: {what}'] = {str(k): [first/v, 1000/v] for k,v in speed.items()}
    return out

def hyper_rows(device, rounds, sync):
    "Milliseconds of a hyper-step with so many hyper-layers, and of a search with so many hyper-steps"
    learn = learner('wrn-16-2', 6, device)
    norms = [m for m in learn.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    layers,steps = {n: [] for n in (1,4,13)},{n: [] for n in (0,1,2,4)}
    seconds(learn, HBACallback(seed=0, warmup=0.), sync)
    for _ in range(rounds):
        for n in layers:
            probe = Seconds(sync)
            seconds(learn, Watched(probe, norms[:n]), sync)
            layers[n].append(sum(probe.took)/3)
        for n in steps: steps[n].append(seconds(learn, HBACallback(T_val=n, seed=0, warmup=0.) if n else None, sync))
    med = lambda d: {str(k): [float(np.median(v)/np.median(d[next(iter(d))])), 1000*float(np.median(v))] for k,v in d.items()}
    return {'hyper-step: number of hyper-layers (batch norms of WRN-16-2)': med(layers),
            'search of 6 batches: hyper-steps after every second one (0: plain)': med(steps)}

def table(d):
    rows = [f"| {k} | {', '.join(f'{n}: {r:.2f} ({ms:.1f} ms)' for n,(r,ms) in v.items())} |" for k,v in d['rows'].items()]
    return '\n'.join(['| what grows | time ÷ that of the first (time) |','| --- | --- |',*rows,'',footer(d['environment']),''])

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--device', default='cpu')
    ap.add_argument('--threads', type=int, default=1)
    ap.add_argument('--rounds', type=int, default=3)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    sync = torch.cuda.synchronize if a.device=='cuda' else lambda: None
    d = dict(rows={**transform_rows(a.device, 5, sync), **hyper_rows(a.device, a.rounds, sync)}, environment=environment())
    out = RESULTS/f'growth_{a.device}.json'
    save_json(out, d)
    out.with_suffix('.md').write_text(table(d))
    print(table(d))
