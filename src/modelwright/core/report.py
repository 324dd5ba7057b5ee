class Report:
    def __init__(self, title): self.title=title; self.facts={}; self.steps=[]
    def step(self, e): self.steps.append(e)
    def html(self): return "<html></html>"
