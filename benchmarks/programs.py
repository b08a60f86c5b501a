"""Do the package and the loop of `payoff.py` train alike? Late mixing under the start policy by both, from the same weights

    python benchmarks/programs.py --seeds 0 1 2 3 4 5   # runs what is missing, then writes results/programs.md

The digits, shifts and networks of payoff.py after 300 steps, with 100 target images. For each seed of the data there are two of the weights, `seed` and
`seed+1000`: most arms of payoff.py have the first where the package trains, and the second where the loop does.
results/programs.jsonl: seed, weights, shift, and the error in percent of `loop` and `package`.
"""
import argparse,json
import numpy as np
import torch
import payoff
from common import RESULTS,environment,made_by
from payoff import Cell,judge,pm
from hba_fastai.all import PBAPolicy,PolicyCallback

FILE,STEPS = RESULTS/'programs.jsonl',300
SHIFTS = 'Invert Rotate Contrast TranslateX Contrast+Rotate noise fog scanner'.split()

def lines(): return [json.loads(l) for l in FILE.read_text().splitlines()] if FILE.exists() else []
def runs(): return {(r['seed'],r['weights'],r['shift']): r for r in lines() if 'shift' in r}
def write(r):
    with FILE.open('a') as f: f.write(json.dumps(r)+'\n')

def run(seed, weights, shift):
    cell = Cell(STEPS, shift, seed, 100)
    loop = payoff.train(cell.source, STEPS, weights, payoff.POLICIES['start'](), target=cell.target, since=0.6)
    package,_ = payoff.in_package(cell.source, cell.target, STEPS, weights, lambda dl: PolicyCallback(PBAPolicy(), target=dl, seed=weights))
    return dict(seed=seed, weights=weights, shift=shift, **{k: judge(net, cell.moved_test)[0] for k,net in dict(loop=loop, package=package).items()})

def table():
    rs,out = runs(),['Error in percent on 997 digits, mean over eight shifts, by the loop of `payoff.py` and by the package.','',
                     *payoff.head('data', 'weights', 'loop', 'package', 'loop − package')]
    mean = lambda seed,weights,k: np.mean([r[k] for (s,w,_),r in rs.items() if (s,w)==(seed,weights)])
    cells = sorted({k[:2] for k in rs})
    of = {c: [mean(*c, k) for k in ('loop','package')] for c in cells}
    out += [f'| {s} | {w} | {a:.1f} | {b:.1f} | {a-b:+.1f} |' for (s,w),(a,b) in of.items()]
    same,seeds = [a-b for a,b in of.values()],sorted({s for s,_ in cells})
    other = [of[s,s+1000][0]-of[s,s][1] for s in seeds]
    weights = [of[s,s+1000][1]-of[s,s][1] for s in seeds]
    out += ['',f'Loop less package, the same weights: {pm(same, "+")}. '
            f'Loop with the other weights less package, as `payoff.py` compares: {pm(other, "+")}; the first three, '
            f'which it has at 300 steps: {pm(other[:3], "+")}. Package with the other weights less package: {pm(weights, "+")}.','']
    return '\n'.join(out+made_by([l['environment'] for l in lines() if 'environment' in l]))

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    a = ap.parse_args()
    torch.set_num_threads(1)
    write(dict(environment=environment()))
    for seed in a.seeds:
        for weights in (seed,seed+1000):
            for shift in SHIFTS:
                if (seed,weights,shift) not in runs(): write(run(seed, weights, shift))
    FILE.with_suffix('.md').write_text(table())
