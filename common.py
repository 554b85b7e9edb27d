import torch, warnings, traceback, sys, os
from torch import nn
import weakspot
class CNN(nn.Module):
    def __init__(s,c=3,k=4,w=6):
        super().__init__()
        s.f=nn.Sequential(nn.Conv2d(c,w,3,padding=1),nn.ReLU(inplace=True),nn.Conv2d(w,w,3,padding=1,stride=2),nn.BatchNorm2d(w),nn.ReLU(inplace=True))
        s.p=nn.AdaptiveAvgPool2d(4); s.h=nn.Linear(w*16,k)
    def forward(s,x): return s.h(s.p(s.f(x)).flatten(1))
class ViT(nn.Module):
    def __init__(s,c=3,k=4,d=16):
        super().__init__()
        s.e=nn.Conv2d(c,d,4,4); s.l=nn.TransformerEncoderLayer(d,2,32,batch_first=True,dropout=0.1); s.h=nn.Linear(d,k)
    def forward(s,x):
        t=s.e(x).flatten(2).transpose(1,2); return s.h(s.l(t).mean(1))
def mk(cls=CNN,seed=0,**k):
    torch.manual_seed(seed); m=cls(**k).eval()
    with torch.no_grad():
        for p in m.parameters(): p.mul_(3)
    return m
def imgs(n=3,c=3,h=16,w=16,seed=1): return torch.rand(n,c,h,w,generator=torch.Generator().manual_seed(seed))
def attempt(label,f):
    try:
        r=f(); return ('ok',repr(r)[:100])
    except Exception as e:
        tb=traceback.extract_tb(e.__traceback__)
        last=tb[-1]; inside='weakspot/' in last.filename
        raised=inside and (last.line or '').lstrip().startswith('raise') or (inside and '_checks' in last.filename)
        kind='clean' if raised and isinstance(e,(ValueError,TypeError)) else 'RAW'
        w=[t for t in tb if '/weakspot/' in t.filename]
        return (kind,type(e).__name__+': '+str(e)[:150], (w[-1].filename.split('src/weakspot/')[-1]+':'+str(w[-1].lineno)) if w else '')
