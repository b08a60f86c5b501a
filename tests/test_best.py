"A search by the best of a population (Eq. 9)"
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.metrics import error_rate
from hba_fastai.data import digits_dls
from hba_fastai.search import HBACallback
from hba_fastai.session import digits_net

def test_what_has_no_gradient_can_choose_the_best():
    learn = Learner(digits_dls(seed=0), digits_net())
    learn.remove_cb(ProgressCallback); learn.logger = lambda row: None
    hba = HBACallback(exploit='best', hyper_loss=error_rate, warmup=0., seed=0)
    learn.fit(1, 0.01, cbs=hba)
    assert hba.hyper_steps and not len(hba.lam.gradients())
    assert (hba.lam.value!=hba.start).all() # the best of three is λ+ε, and never λ
