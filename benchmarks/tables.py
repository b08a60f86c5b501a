"""What the papers say, as data: Tables 8 and 9 (how to search and to train), the rows of the other tables with their published figures,
and `compared`, which puts ours beside them. Chen & Chang, Hypernetwork-Based Augmentation (arXiv 2006.06320).
"""
import json,re,statistics
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).resolve().parent/'results'

class Setting(NamedTuple):
    "A line of Table 8 or 9"
    data:str          # Data set
    model:str         # Name in models.py
    lr:float          # α
    schedule:str      # of α: 'cosine', 'step' (a tenth at epochs 90, 180 and 240 of 270) or 'stn' (see `hba_fastai.stn`)
    wd:float          # Weight decay
    bs:int            # Batch size
    epochs:int
    n_train:int|None=None # Training images; None: all
    n_valid:int=0     # Images of the hyper-steps
    hlr:float|None=None # α', constant
    strategy:str='first_bn'
    sigma:float=1.
    held:str='test'   # What the error is of: 'test', or 'val': the last 10,000 of the shuffled training images

def slug(data, model) -> str:
    "`cifar10_wrn-40-2`, `cifar10_shake-shake-26-2x32d`"
    return data.replace('-','').lower() + '_' + re.sub('[^a-z0-9]+', '-', model.lower()).strip('-')

# --- Table 8: the search. The sizes of the reduced sets and α are the table's; the splits of the ablations are those of 4.1

TABLE8 = {
    'reduced_cifar10':  Setting('CIFAR-10', 'WRN-40-2', 0.05, 'cosine', 0.005, 128, 200, 4000, 10_000, 0.03),
    'reduced_svhn':     Setting('SVHN', 'WRN-40-2', 0.01, 'cosine', 0.01, 128, 160, 4000, 10_000, 0.02),
    'reduced_imagenet': Setting('ImageNet-120', 'WRN-40-2', 0.1, 'step', 0.001, 128, 270, 6000, 10_000, 0.007),
    **{f'target_{slug(data, model)}': Setting(data, model, 0.1, 'cosine', 0.0005, 128, 200, 40_000, 10_000, 0.003)
       for data in ('CIFAR-10','CIFAR-100') for model in ('WRN-40-2','WRN-28-10')},
    'stn': Setting('CIFAR-10', 'AlexNet', 0.01, 'stn', 0., 128, 500, 40_000, 10_000, 0.003, strategy='conv')} # Table 6: STN's settings

STRATEGIES = {'Conv + BN': 'conv+bn', 'Conv': 'conv', 'BN': 'bn', '1st Conv': 'first_conv', '1st BN': 'first_bn'}

def ablation(data, model, strategy='first_bn', sigma=1.):
    "A search of Section 4.1: 30,000 images to train, 10,000 (Val0) for the hyper-steps, judged on 10,000 more (Val)"
    return TABLE8[f'target_{slug(data, model)}']._replace(n_train=30_000, strategy=strategy, sigma=sigma, held='val')

SEARCHES = {**TABLE8, **{f'ablation_{slug(data, model)}_{s}': ablation(data, model, s) for data in ('CIFAR-10','CIFAR-100')
                         for model in ('WRN-40-2','WRN-28-10') for s in STRATEGIES.values()},
            **{f"ablation_{slug('CIFAR-10', model)}_sigma{s:g}": ablation('CIFAR-10', model, sigma=s)
               for model in ('WRN-40-2','WRN-28-10') for s in (0.5,2.)}}

# --- Table 9: the training under a schedule. The paper has no line for WRN-40-2 on CIFAR-100: it is trained as WRN-28-10 is

TRAININGS = {slug(o.data, o.model): o for o in [
    Setting('CIFAR-10', 'WRN-40-2', 0.1, 'cosine', 0.0005, 128, 200),
    Setting('CIFAR-10', 'WRN-28-10', 0.1, 'cosine', 0.0005, 128, 200),
    Setting('CIFAR-10', 'Shake-Shake (26 2x32d)', 0.01, 'cosine', 0.001, 128, 1800),
    Setting('CIFAR-10', 'Shake-Shake (26 2x96d)', 0.01, 'cosine', 0.001, 128, 1800),
    Setting('CIFAR-10', 'Shake-Shake (26 2x112d)', 0.01, 'cosine', 0.001, 128, 1800),
    Setting('CIFAR-10', 'PyramidNet+ShakeDrop', 0.05, 'cosine', 0.00005, 64, 1800),
    Setting('CIFAR-100', 'WRN-40-2', 0.1, 'cosine', 0.0005, 128, 200),
    Setting('CIFAR-100', 'WRN-28-10', 0.1, 'cosine', 0.0005, 128, 200),
    Setting('CIFAR-100', 'Shake-Shake (26 2x96d)', 0.01, 'cosine', 0.0025, 128, 1800),
    Setting('CIFAR-100', 'PyramidNet+ShakeDrop', 0.025, 'cosine', 0.0005, 64, 1800),
    Setting('SVHN', 'WRN-28-10', 0.005, 'cosine', 0.001, 128, 160),
    Setting('SVHN', 'Shake-Shake (26 2x96d)', 0.01, 'cosine', 0.00015, 128, 160),
    Setting('ImageNet', 'ResNet-50', 0.1, 'step', 0.0001, 256, 270)]}

# what the replay of a search's own task is called: the same images, and in the ablations Train30k and Val0 together, as in 4.1
TRAININGS.update({f'again_{k}': o._replace(n_train=o.n_train + (o.held=='val')*o.n_valid, n_valid=0) for k,o in SEARCHES.items()
                  if k.startswith(('reduced','ablation'))})

# --- the rows

class Row(NamedTuple):
    "A row of a table: a search, the training under its schedule, and what the paper says"
    search:str
    training:str|None # None: the search is judged itself
    error:str=''      # Published error in percent: mean ± standard deviation of five runs
    hours:str=''      # Published GPU hours of the search, on a V100
    others:str=''     # Published figures of others

def rows_10():
    errors = {'WRN-40-2': ('4.01 ± 0.09|22.66 ± 0.19|2.03','3.94 ± 0.08|22.71 ± 0.34|1.53','3.86 ± 0.08|22.86 ± 0.22|1.33',
                           '3.85 ± 0.06|22.66 ± 0.40|0.86','4.02 ± 0.11|22.20 ± 0.10|0.87'),
              'WRN-28-10': ('2.85 ± 0.13|19.15 ± 0.21|7.74','2.88 ± 0.06|19.18 ± 0.26|6.85','2.74 ± 0.05|19.18 ± 0.34|4.23',
                            '2.81 ± 0.07|19.39 ± 0.25|3.36','2.72 ± 0.12|18.80 ± 0.34|3.37')}
    out = {}
    for model,lines in errors.items():
        for i,data in enumerate(('CIFAR-10','CIFAR-100')):
            for s,line in zip(STRATEGIES.values(), lines):
                name,figures = f'{slug(data, model)}_{s}',line.split('|')
                out[name] = Row(f'ablation_{name}', f'again_ablation_{name}', figures[i], figures[2])
    return out

def rows_sigma():
    out = {}
    for model,errors in {'WRN-28-10': ('3.43 ± 0.09','3.30 ± 0.10','3.38 ± 0.05'), 'WRN-40-2': ('','','')}.items():
        for s,error in zip((0.5,1.,2.), errors):
            search = f"ablation_{slug('CIFAR-10', model)}_{'first_bn' if s==1 else f'sigma{s:g}'}"
            out[f'{model.lower()}_{s:g}'] = Row(search, f'again_{search}', error)
    return out

def rows_4():
    names = 'Baseline Cutout AA PBA FAA OHLAA RA AdvAA DADA'.split()
    published = { # HBA; the others. The paper's text has 3.6 of WRN-40-2 in AdvAA's column; it is DADA's, with which "3 wins, 9 ties, and 1 loss" come out
        'cifar10_wrn-40-2': ('3.80 ± 0.15','5.3 4.1 3.7 - 3.6 - - - 3.6'), 'cifar10_wrn-28-10': ('2.63 ± 0.10','3.9 3.1 2.6 2.6 2.7 - 2.7 1.9 2.7'),
        'cifar10_shake-shake-26-2x32d': ('2.63 ± 0.16','3.6 3.0 2.5 2.5 2.7 - - 2.4 2.7'),
        'cifar10_shake-shake-26-2x96d': ('2.03 ± 0.10','2.9 2.6 2.0 2.0 2.0 - 2.0 1.9 2.0'),
        'cifar10_shake-shake-26-2x112d': ('1.97 ± 0.05','2.8 2.6 1.9 2.0 2.0 - - 1.8 2.0'),
        'cifar10_pyramidnet-shakedrop': ('1.58 ± 0.06','2.7 2.3 1.5 1.5 1.8 - 1.7 1.4 1.7'),
        'cifar100_wrn-40-2': ('20.60 ± 0.37','26.0 25.2 20.7 - 20.7 - - - 20.9'),
        'cifar100_wrn-28-10': ('17.46 ± 0.48','18.8 18.4 17.1 16.7 17.3 - 16.7 15.5 17.5'),
        'cifar100_shake-shake-26-2x96d': ('15.35 ± 0.38','17.1 16.0 14.3 15.3 14.9 - - 14.1 15.3'),
        'cifar100_pyramidnet-shakedrop': ('12.10 ± 0.14','14.0 12.2 10.7 10.9 11.9 - - 10.4 11.2'),
        'svhn_wrn-28-10': ('1.11 ± 0.02','1.5 1.3 1.1 1.2 1.1 - 1.0 - 1.2'), 'svhn_shake-shake-26-2x96d': ('1.05 ± 0.03','1.4 1.2 1.0 1.1 - - - - 1.1'),
        'imagenet_resnet-50': ('22.11 ± 0.10 (top-5: 6.17 ± 0.05)','23.7 - 22.4 - 22.4 21.1 22.4 20.6 22.5')}
    others = {k: ', '.join(f'{n} {e}' for n,e in zip(names, o.split()) if e!='-') for k,(_,o) in published.items()}
    others['imagenet_resnet-50'] += '; top-5: Baseline 6.9, AA 6.2, FAA 6.3, OHLAA 5.7, RA 6.2, AdvAA 5.5, DADA 6.5'
    proxy = {'cifar10': 'reduced_cifar10', 'cifar100': 'reduced_cifar10', 'svhn': 'reduced_svhn', 'imagenet': 'reduced_imagenet'}
    return {k: Row(proxy[k.split('_')[0]], k, error, '', others[k]) for k,(error,_) in published.items()}

def rows_5():
    proxies = {'cifar10_wrn-40-2': '3.78 ± 0.15', 'cifar100_wrn-40-2': '20.58 ± 0.37', 'cifar10_wrn-28-10': '2.63 ± 0.10',
               'cifar100_wrn-28-10': '17.46 ± 0.48'}
    targets = {'cifar10_wrn-40-2': ('3.63 ± 0.07','1.2'), 'cifar100_wrn-40-2': ('20.80 ± 0.28','1.2'), 'cifar10_wrn-28-10': ('2.59 ± 0.09','4.5'),
               'cifar100_wrn-28-10': ('16.87 ± 0.22','4.5')}
    return {**{f'proxy_{k}': Row('reduced_cifar10', k, error, '0.1') for k,error in proxies.items()},
            **{f'target_{k}': Row(f'target_{k}', k, error, hours) for k,(error,hours) in targets.items()}}

TABLES = { # the caption, and the rows
    '2': ('Weight sharing strategies, WRN-28-10', {k: r for k,r in rows_10().items() if 'wrn-28-10' in k}),
    '3': ('GPU hours of a search', {
        'reduced_cifar10': Row('reduced_cifar10', 'again_reduced_cifar10', '', '0.1', 'GPU hours: AA 5000, PBA 5, FAA 3.5, OHLAA 83.4, DADA 0.1'),
        'reduced_svhn': Row('reduced_svhn', 'again_reduced_svhn', '', '0.1', 'GPU hours: AA 1000, PBA 1, FAA 1.5, DADA 0.1'),
        'reduced_imagenet': Row('reduced_imagenet', 'again_reduced_imagenet', '', '0.9',
                                'GPU hours: AA 15000, FAA 450, OHLAA 625, AdvAA 1280, DADA 1.3')}),
    '4': ('Test error in percent', rows_4()),
    '5': ('Search on a proxy or on the target task', rows_5()),
    '6': ('15 regularisers of an AlexNet', {'hba': Row('stn', None, '18.76 ± 0.11', '', 'STN 19.86 ± 0.21')}),
    '10': ('Weight sharing strategies', rows_10()),
    'sigma': ('Standard deviation of the exploration (Section 4.1)', rows_sigma())}

# --- ours beside them

def lines_of(scale, folder=RESULTS/'paper') -> list:
    "The results of a scale: a dictionary for each search and for each training"
    f = folder/f'{scale}.jsonl'
    return [json.loads(l) for l in f.read_text().splitlines()] if f.exists() else []

def of_row(row, lines) -> dict: # {'search': lines, 'training': lines}
    """The results of a row: on the data set itself, or where there are none on what stands in for it; none before its training is done, since a search is
    shared by many rows"""
    all_of = [l for l in lines if l['search']==row.search]
    mine = [l for l in all_of if not l['data'].endswith('JPEG')] or all_of
    training = [l for l in mine if l['part']=='training' and l['training']==row.training]
    return dict(search=[l for l in mine if l['part']=='search'] if training or not row.training else [], training=training)

def spread(v) -> str:
    "Mean ± standard deviation, and the number of runs"
    if not v: return ''
    return f"{statistics.mean(v):.2f}" + (f" ± {statistics.stdev(v):.2f} (n={len(v)})" if len(v)>1 else ' (n=1)')

def errors_of(r) -> str:
    "Errors after the search, and after the training"
    names = {'search': 'searched','training': 'replayed'}
    return '; '.join(f"{names[part]} {spread([l['error'] for l in lines])}" for part,lines in r.items() if lines)

# Seconds of a training on one V100 per million images, with a search of first_bn 1.6 times that: the WRNs by Table 10's hours, others by
# multiplications at the rate of WRN-28-10; ResNet-50 at 400 images/s
PER_MILLION = {'WRN-40-2': 330, 'WRN-28-10': 1260, 'Shake-Shake (26 2x32d)': 500, 'Shake-Shake (26 2x96d)': 1000, 'Shake-Shake (26 2x112d)': 1250,
               'PyramidNet+ShakeDrop': 3000, 'ResNet-50': 2500, 'AlexNet': 50}
ALL = {'CIFAR-10': 50_000, 'CIFAR-100': 50_000, 'SVHN': 604_388, 'ImageNet': 1_281_167}
SEEDS = 5

def hours(setting, search=False) -> float:
    "Estimated GPU hours of one run in full"
    images = (setting.n_train or ALL[setting.data])*setting.epochs
    return images*PER_MILLION[setting.model]*(1.6 if search else 1.)/3.6e9

def hours_of_row(row) -> float:
    "Estimated GPU hours of a row in full: its searches and trainings with all seeds"
    training = hours(TRAININGS[row.training]) if row.training else 0.
    return SEEDS*(float(row.hours or hours(SEARCHES[row.search], True)) + training)

def state_of(row, whole, few) -> str:
    "Run in full, in small, or not yet"
    judged = 'training' if row.training else 'search'
    n = sum(not l['data'].endswith('JPEG') for l in whole[judged]) # another data set, however alike, is no reproduction
    state = f'**in full**, {n} of {SEEDS} seeds' if n else 'in full, on CIFAR-10 as JPEG' if whole[judged] else 'in small' if few[judged] else 'not yet'
    return state if n>=SEEDS else f'{state}; in full about {hours_of_row(row):,.0f} GPU hours'

def compared(table:str, folder=RESULTS/'paper') -> str:
    "A table of the paper beside ours, as Markdown"
    full,small = lines_of('full', folder),lines_of('small', folder)
    columns = ['row','published: error %','published: GPU hours of a search','ours, in full: error %','ours, in small: error %',
               'seconds; MiB; search ÷ training','state']
    out = [f"| {' | '.join(columns)} |", f"|{' --- |'*len(columns)}"]
    for name,row in TABLES[table][1].items():
        whole,few = (of_row(row, l) for l in (full,small))
        published = '; '.join(o for o in (row.error and f'**{row.error}**',row.others) if o)
        out.append(f"| `{name}` | {published} | {row.hours} | {errors_of(whole)} | {errors_of(few)} | {cost_of(few)} | {state_of(row, whole, few)} |")
    return '\n'.join([*out, '', f'`python benchmarks/paper.py --table {table} --row ROW --data FOLDER`, in small with `--scale small --data jpeg`.'])

def alike(lines, *keys) -> bool:
    "Have the settings of all lines the same `keys`?"
    return len({tuple(l['setting'][k] for k in keys) for l in lines})==1

def cost_of(r) -> str:
    "Of a search: its seconds, what it holds for a backward pass, and its seconds per image over those of the training, if that is of the same network"
    if not r['search']: return ''
    mean = lambda part,f: statistics.mean(f(l) for l in r[part])
    each = lambda part: mean(part, lambda l: l['seconds']/l['images_seen'])
    ratio = f"; {each('search')/each('training'):.2f}" if r['training'] and alike([*r['search'],*r['training']], 'model') else ''
    return f"{mean('search', lambda l: l['seconds']):.0f} s; {mean('search', lambda l: l['memory']):.0f} MiB{ratio}"

# --- what the paper concludes: a row against its reference, seed by seed

STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78} # 97.5% quantiles, by degrees of freedom

def interval(v) -> tuple:
    "Mean and half of the 95% interval; infinite for one number"
    half = STUDENT[min(len(v)-1, 4)]*statistics.stdev(v)/len(v)**0.5 if len(v)>1 else float('inf')
    return statistics.mean(v),half

def reference(table, row) -> str:
    "What a row is compared with: the strategy first_bn, σ = 1, the search on the proxy"
    return row.replace('target', 'proxy') if table=='5' else re.match(r'(.*wrn-\d+-\d+)_', row)[1] + ('_1' if table=='sigma' else '_first_bn')

def paired(row, other, lines) -> list:
    "Differences of the errors after the training, seed by seed"
    a,b = ({l['seed']: l['error'] for l in of_row(r, lines)['training']} for r in (row,other))
    return [a[k]-b[k] for k in sorted(a.keys() & b.keys())]

def agrees(ours:tuple, theirs:float) -> str:
    "Is a difference of ours that is none of chance on the same side as theirs? Points at such different errors are not compared"
    d,half = ours
    return 'undecided' if abs(d)<=half else 'ahead or behind as published' if d*theirs>0 else 'the other way round'

def contrasts(table, scale='small', folder=RESULTS/'paper') -> str:
    "The rows of a table less their references, published and ours, as Markdown"
    rows,lines = TABLES[table][1],lines_of(scale, folder)
    out = ['| row less its reference | published: error; time ÷ | ours, replayed: error (95% interval, seeds) | search seconds ÷ | MiB ÷ | |',
           '| --- | --- | --- | --- | --- | --- |']
    number = lambda o: float(o.split()[0]) if o else None
    for name,row in rows.items():
        other = rows[reference(table, name)]
        v = paired(row, other, lines) if other is not row else []
        if not v: continue
        d,theirs = interval(v),number(row.error)-number(other.error) if row.error else None
        time = f'; {number(row.hours)/number(other.hours):.2f}' if row.hours else ''
        mean = lambda r,k: statistics.mean(l[k] for l in of_row(r, lines)['search'])
        same = alike([l for r in (row,other) for l in of_row(r, lines)['search']], 'model', 'n_train')
        ratios = [f'{mean(row, k)/mean(other, k):.2f}' if same else '' for k in ('seconds','memory')]
        published = 'none' if theirs is None else f'{theirs:+.2f}{time}'
        says = '' if theirs is None else agrees(d, theirs)
        out.append(f"| `{name}` | {published} | {d[0]:+.2f} ± {d[1]:.2f} ({len(v)}) | {' | '.join(ratios)} | {says} |")
    return '\n'.join(out) if len(out)>2 else f'No differences yet: the rows of Table {table} have not been run with `--scale {scale}`.'
