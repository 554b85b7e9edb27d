from common import *
from weakspot import Linf
warnings.simplefilter('ignore')
class Tie2(nn.Module):
    def __init__(s):
        super().__init__(); s.c=nn.Conv2d(1,1,1,bias=False); s.c.weight.data.fill_(1.)
    def forward(s,x):
        x=s.c(x)
        g=x[:,:,2:4,2:4].flatten(1).mean(1)-0.5
        return torch.stack([g, -g, g*0-5],1)
m=Tie2().eval(); x=torch.full((1,1,8,8),0.5)
L=torch.tensor([1])
p=weakspot.attacks.pgd(m,x,L,budget=Linf(.1))
e=weakspot.explain(m,p,analyses=['weak_spots','overlap'])
print(e.verdict()); print(e.scores.T.to_string())
# bf16 conv
mm=mk(seed=0).bfloat16()
n=0
X=imgs(400,seed=5)
lo=mm(X.bfloat16()).float() if 0 else weakspot.Classifier.wrap(mm)(X)
t=lo.topk(2,1).values; tied=(t[:,0]==t[:,1]).nonzero()[:,0]; print('bf16 ties',len(tied),'of 400')
if len(tied):
    i=tied[0]; top=lo[i].argmax(); other=[k for k in range(lo.shape[1]) if lo[i,k]==lo[i].max() and k!=top][0]
    xi=X[i:i+1]; L=torch.tensor([other])
    print('pred',top,'label',other)
    s=weakspot.smallest_square(mm,xi,L,budget=Linf(8/255)); print(s,s.needed)
    w=weakspot.weak_spots(mm,xi,L,grid=2); print(w,w.size,w.levels)
    e=weakspot.explain(mm,weakspot.attacks.pgd(mm,xi,L),analyses=['weak_spots','overlap']); print(e.verdict())
