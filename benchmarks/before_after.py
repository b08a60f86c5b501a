"""The transform of an earlier commit and that of the working tree: from a batch of bytes to an augmented batch of floats in [0,1],
as in a search. In turns, in one run.

    python benchmarks/before_after.py COMMIT [--threads 2]

Writes results/before_after.json and .md.
"""
import argparse,subprocess,tempfile
from common import *

WORK = '''
import sys,time,torch
from hba_fastai import space
if hasattr(space, 'PBASpace'): from hba_fastai.pba import PBAPolicy
else: from hba_fastai.policy import PBAPolicy # in earlier commits
PBASpace = getattr(space, 'PBASpace', space.Space)
torch.set_num_threads(int(sys.argv[1]))
new = sys.argv[2]=='after'
for b,s in ((128,32),(64,224)):
    g = torch.Generator().manual_seed(0)
    u = torch.randint(0, 256, (b,3,s//8,s//8), dtype=torch.uint8, generator=g).repeat_interleave(8,2).repeat_interleave(8,3)
    policy,lam = PBAPolicy(),PBASpace().start(0.05).expand(b,-1)
    drawn = lambda: policy.draw_under(lam, None) if hasattr(policy, 'draw_under') else policy.draw(lam)
    def before(): return policy.apply(u.float().div_(255), drawn(), inplace=True)
    def after(): return policy.apply(u, drawn()).float().div_(255)
    f = after if new else before
    for _ in range(3): f()
    n,t = 0,time.perf_counter()
    while time.perf_counter()-t<1: f(); n += 1
    print(s, n*b/(time.perf_counter()-t))
'''

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('commit')
    ap.add_argument('--threads', default='2')
    ap.add_argument('--rounds', type=int, default=6)
    a = ap.parse_args()
    speed = {k: {'32': [], '224': []} for k in ('before','after')}
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run(f'git -C {HERE.parent} archive {a.commit} hba_fastai | tar x -C {tmp}', shell=True, check=True)
        for _ in range(a.rounds):
            for k,path in (('before',tmp),('after',HERE.parent)):
                out = subprocess.run([sys.executable, '-W', 'ignore', '-c', WORK, a.threads, k], capture_output=True, text=True,
                                     check=True, env={**os.environ, 'PYTHONPATH': str(path)}, cwd='/').stdout
                for l in out.splitlines(): speed[k][l.split()[0]].append(float(l.split()[1]))
    d = dict(commit=a.commit, speed=speed, environment={**environment(), 'threads': int(a.threads)})
    save_json(RESULTS/'before_after.json', d)
    pm = lambda v: f'{np.median(v):,.0f} ({min(v):,.0f}, {max(v):,.0f})'
    ratio = lambda s: np.median(np.divide(speed['after'][s], speed['before'][s]))
    rows = [f"| {s}x{s}, batch {b} | {pm(speed['before'][s])} | {pm(speed['after'][s])} | {ratio(s):.2f} |" for s,b in (('32',128),('224',64))]
    head = f'| images | before (commit {a.commit}), images/s | after | ratio, median of pairs |'
    (RESULTS/'before_after.md').write_text('\n'.join([head,'| --- | --- | --- | --- |',*rows,'',
        footer(d['environment'], f'{a.rounds} rounds in turns'),'']))
    print((RESULTS/'before_after.md').read_text())
