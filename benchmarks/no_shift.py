"""Does a search cost anything where nothing differs?

    python benchmarks/no_shift.py --seeds 0 1 2 3 4 5 6 7    # runs what is missing, then writes results/no_shift.md
    python benchmarks/no_shift.py --table

The digits of payoff.py without a shift: 250 or 1,000 training images, 200 validation images for the hyper-steps, the rest for the test; short and long
trainings. Every arm is trained on the training images alone. The control is the one that the validation images choose among `CONTROLS` (loss), for each
cell and seed. The first rule of `sparing` was chosen on seeds 0 to 4: it spared also what a search adds, and its code is gone.
The rule of today was chosen on the 300 steps of all seeds, and on planted shifts (planted.py).
results/no_shift.jsonl: n_train, steps, seed, arm, error, valid_loss, cpu_seconds.
"""
import argparse,gc,json,time
from itertools import product
import torch
import payoff
from common import RESULTS,environment,made_by,mean_se
from payoff import POLICIES,Replay,digits,head,in_package,judge,pm,train
from hba_fastai.all import HBACallback

FILE = RESULTS/'no_shift.jsonl'
CONTROLS = {'nothing': 'no augmentation', 'crop': 'crop', 'trivial': 'TrivialAugmentWide', 'start': 'start policy'}
ARMS = {**CONTROLS, 'search': '**search**, its own network', 'replay': '**replay** of its schedule', 'final': 'its last policy alone',
        'sparing': '**search** with `sparing=True`, its own network', 'sparing_replay': '**replay** of its schedule',
        'sparing_all': '**search** where what it adds is spared as well, its own network', 'sparing_all_replay': '**replay** of its schedule'}
GONE = ['sparing_all','sparing_all_replay'] # arms without code
REPLAYS = {'search': ['replay','final'], 'sparing': ['sparing_replay']} # of what each search finds
OURS = [a for a in ARMS if a not in CONTROLS]
CHOSEN_ON = range(5) # seeds
CELLS = list(product([250,1000], [300,1500]))

def sets(n, seed):
    x,y = digits()
    i = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split([n, 200, len(x)-n-200])
    return [(x[j],y[j]) for j in i]

def last_of(schedule):
    s = payoff.start_values()
    return type(s)([0.], schedule.table[-1:], schedule.sigma)

def run(n, steps, seed, done):
    "Lines of the arms of a cell that are not `done`"
    source,valid,test = sets(n, seed)
    found = None # by the last search
    for arm in ARMS:
        if arm in GONE or {arm, *REPLAYS.get(arm, [])} <= done: continue
        t = time.process_time()
        if arm in REPLAYS:
            net,hba = in_package(source, valid, steps, seed, lambda dl: HBACallback(valid=dl, seed=seed, sparing=arm=='sparing'))
            found = hba.schedule
        else:
            policy = POLICIES[arm]() if arm in CONTROLS else Replay(last_of(found) if arm=='final' else found)
            net = train(source, steps, seed+1000, policy)
        scores = dict(error=judge(net, test)[0], valid_loss=judge(net, valid)[1], cpu_seconds=round(time.process_time()-t, 1))
        if arm not in done: yield dict(n_train=n, steps=steps, seed=seed, arm=arm, **scores)

def lines(): return [json.loads(l) for l in FILE.read_text().splitlines()] if FILE.exists() else []
def runs(): return {(r['n_train'],r['steps'],r['seed'],r['arm']): r for r in lines() if 'arm' in r}

def differences(rs, cell, arm, seeds) -> list:
    "Error of `arm` minus that of the control that the validation images chose, by seed"
    of = lambda s, a: rs[(*cell,s,a)]
    return [of(s, arm)['error'] - of(s, min(CONTROLS, key=lambda a: of(s, a)['valid_loss']))['error'] for s in seeds if (*cell,s,arm) in rs]

def table():
    rs = runs()
    out = ['Error in percent on unseen digits, no shift: mean ± standard error over seeds (number of seeds).','']
    out += [*head('training', *[f'{n} images, {s} steps' for n,s in CELLS])]
    for arm,what in ARMS.items():
        cells = [pm([r['error'] for k,r in rs.items() if k[:2]==c and k[3]==arm]) for c in CELLS]
        out.append(f"| {what} | {' | '.join(cells)} |")
    notes,all_seeds = [],sorted({k[2] for k in rs})
    for ours in OURS:
        d = [differences(rs, c, ours, all_seeds) for c in CELLS]
        out.append(f"| *{ours} − the control that validation chose* | {' | '.join(pm(o, '+') for o in d)} |")
    for a,b in (('sparing','search'), ('sparing_replay','replay')):
        d = [[rs[(*c,s,a)]['error']-rs[(*c,s,b)]['error'] for s in all_seeds if (*c,s,a) in rs] for c in CELLS]
        out.append(f"| *{a} − {b}, paired* | {' | '.join(pm(o, '+') for o in d)} |")
    groups = {'all seeds': all_seeds, 'seeds that chose nothing': [s for s in all_seeds if s not in CHOSEN_ON]}
    for ours,(name,seeds) in product(OURS, groups.items()):
        if seeds!=all_seeds and ours in ('sparing','sparing_replay'): continue # all seeds had a part in its choice
        d = sum([differences(rs, c, ours, seeds) for c in CELLS], [])
        if len(d)<2: continue
        mean,se = mean_se(d)
        notes.append(f'Pooled over cells and {name}, {ours} − control: {mean:+.2f} ± {se:.2f} ({len(d)}); upper 95% bound {mean+1.645*se:+.2f}.  ')
    out += ['',*notes,'']
    env = [l['environment'] for l in lines() if 'environment' in l]
    out += made_by(env)
    FILE.with_suffix('.md').write_text('\n'.join(out))

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--seeds', type=int, nargs='+', default=list(range(8)))
    ap.add_argument('--table', action='store_true', help='only write the table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    if not a.table:
        with FILE.open('a') as f: f.write(json.dumps(dict(environment=environment()))+'\n')
    for seed in [] if a.table else a.seeds:
        for n,steps in CELLS:
            rows = list(run(n, steps, seed, {k[3] for k in runs() if k[:3]==(n,steps,seed)}))
            if not rows: continue
            with FILE.open('a') as f: f.writelines(json.dumps(r)+'\n' for r in rows)
            print(n, steps, seed, {r['arm']: round(r['error'], 1) for r in rows}, flush=True)
            gc.collect()
    table()
