"""What the response of the first batch norm costs: forward and backward of the plain layer, of the response written with the operations of
torch one by one, and of the package's own.

    python benchmarks/batchnorm.py [--shape 128 64 16 16] [--repeats 200] [--threads 1]

Time is CPU seconds. The three take turns within each repeat, so that a drift of the machine cancels; a ratio is the median over
the repeats of one turn's time ÷ the plain one's. Writes results/batchnorm_cpu.json and .md.
"""
import argparse,time
import torch
from torch import nn
from common import *
from hba_fastai.hyper import HyperLayer

FORMATS = {'contiguous': torch.contiguous_format, 'channels last': torch.channels_last}
ARMS = ['plain','one by one','own']

class Derived(nn.BatchNorm2d):
    "The same layer with a `forward` of its own: its response is written with the operations of torch"
    def forward(self, x): return super().forward(x)

def layer(arm, shape):
    "A batch norm with its hyper-layer"
    torch.manual_seed(0)
    h = HyperLayer((Derived if arm=='one by one' else nn.BatchNorm2d)(shape[1]), 27)
    for v in h.V.values(): nn.init.normal_(v)
    if arm!='plain': h.z = torch.randn(shape[0], 27)
    return h

def seconds(h, x, up):
    "CPU time of one pass forward and back"
    wanted = [x,*h.layer.parameters(),*([] if h.z is None else [*h.U.values(),*h.V.values()])]
    t = time.process_time()
    torch.autograd.grad(h.forward(x), wanted, up)
    return time.process_time()-t

def measure(shape, form, repeats):
    layers = [layer(arm, shape) for arm in ARMS]
    x,up = (torch.randn(shape).to(memory_format=FORMATS[form]) for _ in range(2)) # input and gradient of the output
    x.requires_grad_()
    took = np.array([[seconds(h, x, up) for h in layers] for _ in range(repeats+5)])[5:] # the first warm up
    ratio,ms = took/took[:,:1],1000*took
    quarter = lambda a,q: float(np.quantile(a, q))
    return {arm: dict(ms=float(np.median(ms[:,i])), fastest_ms=float(ms[:,i].min()), ratio=float(np.median(ratio[:,i])),
                      low=quarter(ratio[:,i], 0.25), high=quarter(ratio[:,i], 0.75)) for i,arm in enumerate(ARMS)}

def table(d):
    rows = ['| memory format | batch norm | median ms | fastest ms | time ÷ plain (quartiles) |','| --- | --- | --- | --- | --- |']
    for form,arms in d['formats'].items():
        for arm,v in arms.items():
            ratio = f"{v['ratio']:.2f} ({v['low']:.2f}, {v['high']:.2f})"
            rows.append(f"| {form} | {arm} | {v['ms']:.1f} | {v['fastest_ms']:.1f} | {ratio} |")
    size = '×'.join(map(str, d['shape']))
    return '\n'.join([f"Forward and backward of a batch norm of {size}, {d['repeats']} repeats", '', *rows, '', footer(d['environment']), ''])

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--shape', type=int, nargs=4, default=[128,64,16,16])
    ap.add_argument('--repeats', type=int, default=200)
    ap.add_argument('--threads', type=int, default=1)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    d = dict(shape=a.shape, repeats=a.repeats, formats={f: measure(a.shape, f, a.repeats) for f in FORMATS})
    d['environment'] = environment()
    out = RESULTS/'batchnorm_cpu.json'
    save_json(out, d)
    out.with_suffix('.md').write_text(table(d))
    print(table(d))
