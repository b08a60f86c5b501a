"""Does a process that searches all day grow, and does any file of a stranger do harm?

    python benchmarks/soak.py --searches 200 --files 10000    # writes results/soak.md

One process makes searches and replays on digits, one after the other, each with a Learner, a checkpoint and a schedule of its own; every tenth is stopped by
Ctrl-C within a batch, and every tenth ends in an error of another callback.
Memory, open files, threads and living Learners are read behind a collection of garbage.
Then schedule and checkpoint files are damaged at random: each must be read as a sound one or be refused by our own error.
"""
import argparse,gc,os,random,tempfile,threading,time,warnings
from pathlib import Path
import torch
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from common import RESULTS,environment,made_by,quiet
from hba_fastai.all import HBACallback,Schedule,ScheduleCallback
from hba_fastai.checkpoint import CheckpointError,load_checkpoint
from hba_fastai.data import digits_dls
from hba_fastai.schedule import ScheduleError

class Boom(Callback):
    "Raise an error in a batch of the second epoch"
    def __init__(self, error): self.error = error
    def after_pred(self):
        if self.training and self.epoch==1: raise self.error

def learner(folder):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    learn = Learner(digits_dls(200, 50, bs=25), net, path=folder).remove_cb(ProgressCallback)
    learn.logger = quiet
    return learn

def search_and_replay(i, folder):
    "One search, a replay of what it found, and both files"
    error = {3: KeyboardInterrupt('test'), 7: RuntimeError('test')}.get(i%10)
    learn,hba = learner(folder),HBACallback(seed=i, checkpoint=f's{i%5}')
    try: learn.fit(3, cbs=[hba, *([Boom(error)] if error else [])])
    except (KeyboardInterrupt,RuntimeError) as e:
        if 'test' not in str(e): raise
    hba.schedule.save(folder/'s.json')
    learner(folder).fit(1, cbs=ScheduleCallback(folder/'s.json'))

def size() -> dict:
    "Of this process"
    gc.collect()
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    alive = sum(isinstance(o, Learner) for o in gc.get_objects())
    return {'memory, MB': round(pages*os.sysconf('SC_PAGE_SIZE')/2**20), 'open files': len(os.listdir('/proc/self/fd')), 'threads': threading.active_count(),
            'Learners alive': alive}

def damaged(data:bytes, rng) -> bytes:
    "Some bytes flipped, cut, doubled or zeroed"
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i,k = rng.randrange(len(data)+1),rng.randint(1, 40)
        what = rng.choice(['flip','cut','double','zero'])
        if what=='flip' and i<len(data): data[i] ^= rng.randint(1, 255)
        elif what=='cut': del data[i:i+k]
        elif what=='double': data[i:i] = data[i:i+k]
        else: data[i:i+k] = bytes(len(data[i:i+k]))
    return bytes(data)

def read_damaged(data:bytes, read, error, file:Path, n:int, rng) -> dict:
    "How many of `n` damaged files are read, and how many refused; another error ends it"
    out = dict(read=0, refused=0)
    for _ in range(n):
        new = data
        while new==data: new = damaged(data, rng)
        file.write_bytes(new)
        try: read(file)
        except error: out['refused'] += 1
        else: out['read'] += 1
    return out

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--searches', type=int, default=200)
    ap.add_argument('--files', type=int, default=10_000)
    a = ap.parse_args()
    torch.set_num_threads(1); warnings.simplefilter('ignore')
    rows,start = {},time.process_time()
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        for i in range(1, a.searches+1):
            search_and_replay(i, d)
            if i in (1,10) or i%50==0: rows[i] = size(); print(i, rows[i], flush=True)
        rng = random.Random(0)
        checkpoint = min((d/'models').glob('*.pth'))
        kinds = {'schedule': (d/'s.json', Schedule.load, ScheduleError), 'checkpoint': (checkpoint, lambda f: load_checkpoint(f, 'cpu'), CheckpointError)}
        files = {kind: read_damaged(f.read_bytes(), read, error, f, a.files, rng) for kind,(f,read,error) in kinds.items()}
    seconds = f'{time.process_time()-start:.0f} CPU seconds.'
    lines = ['| searches and replays | '+' | '.join(rows[1])+' |', '| --- '*(len(rows[1])+1)+'|',
             *[f"| {i} | {' | '.join(map(str, r.values()))} |" for i,r in rows.items()], '',
             '| damaged files | read as sound | refused by our error | other errors |', '| --- | --- | --- | --- |',
             *[f"| {a.files} of a {kind} | {n['read']} | {n['refused']} | 0 |" for kind,n in files.items()], '', seconds, '']
    (RESULTS/'soak.md').write_text('\n'.join([*lines, *made_by([environment()])]))
