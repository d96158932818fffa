#include "snapshot/world.hpp"
import cobuild.base;
