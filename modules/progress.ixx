/// cobuild.progress: what a build tells about itself while it runs: vertices, their status lines, their output, warnings.
///
/// The events and their meaning are those of BuildKit's status stream, so the daemon passes them on and `rawjson` prints
/// them field by field. Events about one vertex leave in the order they happened. A vertex event carries the vertex' whole
/// state and replaces the one before it with the same id; a second `started` after a completion opens a second interval.
///
/// Thread safety: a sink, and so a writer and a line, is called on the engine's io thread only; whatever runs on a pool
/// thread posts there first. A sink never blocks and never throws; one that feeds a slow reader drops or merges by itself.
/// Not responsible for drawing, grouping, rate limits or cutting logs.
module;
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

export module cobuild.progress;

import cobuild.base;

export namespace cobuild::progress {

using time_point = std::chrono::sys_time<nanoseconds>;

/// Vertices with the same group id are shown as one line under the group's name.
struct group {
    std::string id;
    std::string name;
    bool weak = false;  ///< a group of only weak members stays hidden until another member starts or fails
    bool operator==(const group&) const = default;
};

/// One step of the build.
struct vertex {
    digest id;
    std::string name;
    std::vector<digest> inputs;
    std::optional<time_point> started;    ///< when it got its slot; empty while it waits
    std::optional<time_point> completed;  ///< also set when it failed or was cancelled
    bool cached = false;                  ///< its result was there already
    std::string error;                    ///< why it failed; empty while it has not
    bool canceled = false;                ///< it ended because somebody asked to stop; `error` says why
    std::optional<group> progress_group;
    bool operator==(const vertex&) const = default;
};

/// A line below a vertex: "extracting sha256:...", 1.2MB of 3MB. `id` is the text shown and unique within the vertex.
struct status {
    std::string id;
    digest vertex;
    std::string name;
    std::int64_t current = 0;
    std::int64_t total = 0;  ///< 0: not known
    time_point timestamp{};
    std::optional<time_point> started;
    std::optional<time_point> completed;
    bool operator==(const status&) const = default;
};

enum class stream : std::uint8_t { out = 1, err = 2 };

/// A piece of output, cut anywhere (not at line ends).
struct log {
    digest vertex;
    progress::stream stream = stream::out;
    std::string data;
    time_point timestamp{};
    bool operator==(const log&) const = default;
};

/// Lines and columns from 1; a column 0 is not known.
struct text_range {
    int first_line = 0, first_column = 0, last_line = 0, last_column = 0;
    bool operator==(const text_range&) const = default;
};

struct warning {
    digest vertex;
    int level = 1;
    std::string message;              ///< `short` on the wire
    std::vector<std::string> detail;  ///< lines
    std::string url;
    std::optional<source_location> location;
    std::string source;              ///< the text of the file that `location` names, where it is known
    std::vector<text_range> ranges;  ///< what in it is meant; empty: the location's line
    bool operator==(const warning&) const = default;
};

using event = std::variant<vertex, status, log, warning>;

class sink {
public:
    virtual ~sink() = default;
    virtual void on_event(const event& what) = 0;
};

/// A sink that calls a function.
std::shared_ptr<sink> make_sink(std::function<void(const event&)> f);
/// The sink that forgets.
std::shared_ptr<sink> null_sink();

/// The id of a vertex that is no op of the graph ("[internal] load build definition", an exporter): a digest of its text.
digest internal_id(std::string_view scope, std::string_view name);

class writer;

/// One status line of a vertex; done() once, else it stays unfinished on the screen.
class line {
public:
    line() = default;
    void update(std::int64_t current);
    void update(std::int64_t current, std::int64_t total);
    /// Complete: `current` becomes `total` where that is known.
    void done();

private:
    friend class writer;
    std::shared_ptr<sink> sink_;
    status now_;
};

/// Speaks for one vertex. Keeps the vertex' state; every call sends one event. A default-made writer says nothing.
class writer {
public:
    writer() = default;
    writer(std::shared_ptr<sink> out, vertex about);
    [[nodiscard]] const vertex& about() const noexcept { return about_; }
    [[nodiscard]] const std::shared_ptr<sink>& out() const noexcept { return out_; }

    void announce();  ///< known, not started
    void started();   ///< a new interval: completion, error and `cached` of an earlier one are forgotten
    void completed();
    void cached();                  ///< started and completed at once, from the cache
    void failed(const error& why);  ///< errc::canceled counts as cancelled
    void rename(std::string name);

    [[nodiscard]] line begin(std::string id, std::int64_t total = 0) const;
    void output(progress::stream stream, std::string data) const;
    void warn(warning what) const;  ///< `vertex` is filled in

private:
    void send() const;
    std::shared_ptr<sink> out_;
    vertex about_;
};

}  // namespace cobuild::progress
