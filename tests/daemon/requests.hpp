// Requests that need nothing around them. Stands after the imports: cobuild.llb.
#pragma once

#include "control.pb.h"

namespace cobuild::test {

/// FROM scratch with one file in it, /hello, in which "hi" stands.
inline moby::buildkit::v1::SolveRequest hello_request(const std::string& ref) {
    llb::graph g;
    llb::file_op f;
    f.actions.push_back({.input = llb::scratch,
                         .secondary_input = llb::scratch,
                         .output = 0,
                         .what = llb::mkfile_action{.path = "/hello", .mode = 0644, .data = "hi"}});
    moby::buildkit::v1::SolveRequest r;
    r.set_ref(ref);
    r.set_definition(llb::marshal(g.finish(g.add({.inputs = {}, .what = std::move(f), .platform = {}}))));
    return r;
}

}  // namespace cobuild::test
