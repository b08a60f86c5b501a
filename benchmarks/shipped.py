"""Does a published schedule lose to flip and crop, so that the package should not come with it?

    python benchmarks/shipped.py --seeds 0 1 2    # runs what is missing, then writes the table
    python benchmarks/shipped.py --table          # writes results/shipped.md

CIFAR-10 as JPEG at 16 pixels, WRN-10-1 in bfloat16, 4,000 images, 40 epochs of SGD with a cosine, flip and crop in each arm: `scratch` of `payoff_photos.py`.
Error on 5,000 test images. results/shipped/photos.jsonl holds one line per training, `arm, seed, error, cpu_seconds`, and one with the environment where a
process began.
"""
import argparse,json,time,warnings
import numpy as np
import torch
from common import HERE,RESULTS,environment,made_by,mean_se
from hba_fastai.all import Schedule,ScheduleCallback
from payoff import head,pm
from payoff_photos import Bytes,batched,from_scratch,sets

FILE,TABLE = RESULTS/'shipped'/'photos.jsonl',RESULTS/'shipped.md'
PUBLISHED = {'rcifar10': 200, 'rsvhn': 160} # the epochs of each search
ARMS = {'nothing': 'flip and crop', 'rcifar10': 'the schedule that PBA found on reduced CIFAR-10', 'rsvhn': 'the schedule that PBA found on reduced SVHN'}

def lines(): return [json.loads(l) for l in FILE.read_text().splitlines()] if FILE.exists() else []
def runs(): return {(r['arm'],r['seed']): r for r in lines() if 'arm' in r}
def write(r):
    with FILE.open('a') as f: f.write(json.dumps(r)+'\n')

def callbacks(arm, seed):
    if arm=='nothing': return []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # Cutout of more than 6 pixels
        schedule = Schedule.from_pba(HERE.parent/'tests'/'schedules'/'pba'/f'{arm}_16_wrn.txt', epochs=PUBLISHED[arm])
    return [ScheduleCallback(schedule, seed=seed)]

def run(arm, seed):
    source,target,test,_ = sets('scratch', seed)
    t = time.process_time()
    net = torch.nn.Sequential(Bytes(), from_scratch(source, target, seed, lambda dl: callbacks(arm, seed))).eval()
    return dict(arm=arm, seed=seed, error=batched(net, test), cpu_seconds=round(time.process_time()-t, 1))

def table():
    rs = runs()
    out = ['Error in percent on 5,000 unseen photographs without a shift: mean ± standard error over seeds (number of seeds); differences are paired.','',
           *head('training', 'error %', '− flip and crop', 'in standard errors', 'CPU s')]
    for arm,what in ARMS.items():
        mine = {s: r for (a,s),r in rs.items() if a==arm}
        if not mine: continue
        d = [r['error']-rs['nothing',s]['error'] for s,r in mine.items() if ('nothing',s) in rs]
        difference = [pm(d, '+'),'{0:+.1f}'.format(mean_se(d)[0]/mean_se(d)[1])] if arm!='nothing' and len(d)>1 else ['','']
        errors,seconds = ([r[k] for r in mine.values()] for k in ('error','cpu_seconds'))
        out.append(f"| {what} | {pm(errors)} | {' | '.join(difference)} | {np.mean(seconds):.0f} |")
    return '\n'.join([*out,'',*made_by([l['environment'] for l in lines() if 'environment' in l])])

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    ap.add_argument('--arms', nargs='+', default=list(ARMS), choices=list(ARMS))
    ap.add_argument('--table', action='store_true', help='only write the table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    FILE.parent.mkdir(parents=True, exist_ok=True)
    if not a.table: write(dict(environment=environment()))
    for seed in [] if a.table else a.seeds:
        for arm in a.arms:
            if (arm,seed) in runs(): continue
            r = run(arm, seed)
            print(r, flush=True)
            write(r)
            TABLE.write_text(table())
    TABLE.write_text(table())
