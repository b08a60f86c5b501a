"""What the paper says of the schedule that it found (caption of Figure 4), statement by statement, on schedules that were found here.

    python benchmarks/figure4.py [FILES]     # default: results/schedules/wrn* and results/paper/schedules; writes results/figure4.md
"""
import re,sys
from collections import defaultdict
from pathlib import Path
import torch
from common import RESULTS
from hba_fastai.schedule import Schedule

N = 101 # points of the training that are looked at

def positions(s) -> tuple: # probabilities (N,15), positions of the magnitudes in their ranges (N,12)
    "Means of the copies of each operation, over the training"
    space,groups = s.space,s.space.groups()
    at = torch.stack([s.at(i/(N-1)) for i in range(N)])
    at = (at-space.lo)/(space.hi-space.lo)
    of = lambda kind: torch.stack([at[:,g[kind]].mean(1) for o,g in groups.items() if kind in g and o not in s.off], 1)
    return of('p'),of('m')

# each statement: what it says of (probabilities, magnitudes) -> (number, does it hold?)

def rises(p, m):
    "The sum of the magnitudes rises rapidly at first: the share of its rise to the highest that the first fifth brings is above a half"
    total = m.sum(1)
    rise = total.max()-total[0]
    share = ((total[:N//5+1].max()-total[0])/rise).item() if rise>0 else 0.
    return share,share>0.5 and rise>0.01*total[0]

def falls(p, m):
    "It falls slowly at the end: the highest sum less the last, as a share of the highest, is above 0 and reached more slowly than the rise"
    total = m.sum(1)
    i = total.argmax().item()
    fall = (1-total[-1]/total[i]).item()
    slower = i<N-1 and 0<i and (total[i]-total[-1])/(N-1-i) < (total[i]-total[0])/i
    return fall,bool(fall>0.01 and slower)

def smooth(p, m):
    "The probabilities vary smoothly: the largest change of one within a hundredth of the training is below 0.05"
    jump = p.diff(dim=0).abs().max().item()
    return jump,jump<0.05

def ratio(p, m):
    "The largest probability is about 5 times the smallest during the training: the median of this ratio is between 3.5 and 7"
    r = (p.max(1).values/p.min(1).values).median().item()
    return r,3.5<=r<=7

STATEMENTS = rises,falls,smooth,ratio

def checked(s) -> dict: # `{name: (number, does it hold?)}`
    "Each statement on one schedule"
    return {f.__name__: f(*positions(s)) for f in STATEMENTS}

def kind(f) -> str:
    "Files that differ in the seed alone are of one kind"
    return re.sub(r'_(seed)?\d+(?=_jpeg|_fake|$)', '', f.stem)

def table(files) -> str:
    groups = defaultdict(list)
    for f in files: groups[kind(f)].append(checked(Schedule.load(f)))
    out = [f"- *{f.__name__}*: {f.__doc__}." for f in STATEMENTS] + ['', f"| schedules | n | {' | '.join(f.__name__ for f in STATEMENTS)} |",
                                                                  f"| --- | --- |{' --- |'*len(STATEMENTS)}"]
    for name,found in groups.items():
        def cell(k): # the numbers, and how often it holds
            numbers,holds = zip(*[c[k] for c in found])
            return f"holds in {sum(holds)} of {len(found)} ({', '.join(f'{v:.2f}' for v in numbers)})"
        out.append(f"| {name} | {len(found)} | {' | '.join(cell(f.__name__) for f in STATEMENTS)} |")
    return '\n'.join([*out, '', 'In brackets the number that each statement speaks of, for each seed. `python benchmarks/figure4.py`', ''])

if __name__=='__main__':
    files = [Path(f) for f in sys.argv[1:]] or sorted([*(RESULTS/'schedules').glob('wrn*.json'), *(RESULTS/'paper'/'schedules').glob('*.json')])
    text = table(files)
    print(text)
    if not sys.argv[1:]: (RESULTS/'figure4.md').write_text(text)
