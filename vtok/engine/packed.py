from vtok.engine.towers import Tower
class PackedTower(Tower):
    pass
